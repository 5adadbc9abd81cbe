"""One decode step of a Mamba2 layer, as an engine makes it: a pool of states, one call a token.

Runs on a GPU through the generated kernel, and on a CPU through the PyTorch reference.
"""

import torch

import ssmgen


def main() -> None:
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")

    # A pool of 64 slots, each the state (dim, dstate) of 16 heads, kept in fp16.
    state = torch.zeros(64, 16, 64, 128, dtype=torch.float16)
    slots = torch.tensor([7, 3, 12, -1])  # which slot each row has; -1 is a padded row
    seed = torch.tensor([2026])  # a seed rounds the stored state stochastically

    x = torch.randn(4, 16, 64, dtype=torch.bfloat16)
    B, C = torch.randn(2, 4, 1, 128, dtype=torch.bfloat16)
    dt = torch.randn(4, 16, 1).expand(4, 16, 64)
    A = -torch.rand(16, 1, 1).expand(16, 64, 128)
    D, dt_bias = torch.randn(2, 16, 1).expand(2, 16, 64)

    y = ssmgen.selective_state_update(
        state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True,
        state_batch_indices=slots, rand_seed=seed,
    )  # fmt: skip
    written = state.flatten(1).any(1).nonzero()[:, 0].tolist()
    print(f"y: {tuple(y.shape)} {y.dtype}; slots written: {written}")

    # The kernel behind that call, compiled for a GPU that need not be here.
    config = ssmgen.KernelConfig(state_dtype="fp16", rounding="stochastic")
    print(ssmgen.get_kernel(config, arch="sm_90").explain())


if __name__ == "__main__":
    main()
