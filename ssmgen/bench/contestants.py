"""Who is measured: ssmgen, other libraries where they can be imported, and a plain copy.

An adapter makes, of a `Problem`, one callable per slot set; what it cannot serve it says with
`Missing`. A family's peers are the entries of `PEERS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any

from .problem import POOL_BYTES, Problem, Returned

__all__ = ["COPY", "NAMES", "OURS", "Adapter", "Calls", "Missing", "adapter", "forgiven",
           "versions"]  # fmt: skip

OURS, COPY = "ssmgen", "copy"

Calls = Sequence[Callable[[], Any]]
Adapter = Callable[[Problem], Calls]


class Missing(Exception):
    """A contestant that is not here, or does not do what the problem asks."""


def ours(problem: Problem) -> Calls:
    """The op, as an engine calls it."""
    return [problem.call(which) for which in range(problem.sets)]


def copy(problem: Problem) -> Calls:
    """A pass over as many bytes as the problem must move, that computes nothing: the limit.

    It is in place where a state is written once; else each row of what is read is written as often
    as a state is, one after the other.
    """
    import torch

    from .spread import ALIGNED, spread

    times = problem.times
    rows = 1 if times == 1 else problem.batch
    count = problem.bytes // (4 * rows * (1 + times))
    if times > 1:
        count -= count % ALIGNED
    count = max(1, count)
    turns = min(problem.sets, -(-POOL_BYTES // (4 * rows * count)))
    sources = targets = torch.randn(turns, rows, count, device=problem.device)
    write: Callable[..., Any] = torch.neg
    if times > 1:
        targets = torch.empty(turns, rows, times, count, device=problem.device)
        write = spread
    return [
        functools.partial(write, sources[i % turns], out=targets[i % turns])
        for i in range(problem.sets)
    ]


def _public(name: str, module: str, function: str = "selective_state_update") -> Any:
    """A peer's function."""
    try:
        return getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        if error.name == name:
            raise Missing(f"{name} is not installed") from None
        raise Missing(f"{name} cannot be imported: {error}") from None
    except Exception as error:
        raise Missing(f"{name} cannot be imported: {error}") from None


def _every(problem: Problem, function: Any, take: Callable[[dict[str, Any]], Any]) -> Calls:
    """Calls with what `take` keeps of the op's arguments."""
    return [
        functools.partial(function, **take(problem.arguments(i))) for i in range(problem.sets)
    ]  # fmt: skip


# What every selective_state_update has; the signature of mamba_ssm's.
COMMON = ("state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus",
          "state_batch_indices")  # fmt: skip


def _plain(name: str, config: Any) -> None:
    """Raise `Missing` unless a config is one token a row, rounded to nearest, without scales."""
    if config.many:
        raise Missing(f"{name} is measured with one token a row")
    if config.state_scale_t:
        raise Missing(f"{name} has no block-scaled states ({config.state_dtype})")
    if config.rounding == "stochastic":
        raise Missing(f"{name} is measured with rounding to nearest")


def flashinfer_ssu(problem: Problem) -> Calls:
    function = _public("flashinfer", "flashinfer.mamba")
    config: Any = problem.config
    if config.state_dtype in ("int8", "fp8_e4m3fn"):
        raise Missing(f"flashinfer has no {config.state_dtype} states")
    if config.dim % 64:
        raise Missing(f"flashinfer needs a dim that is a multiple of 64, not {config.dim}")
    stochastic = config.rounding == "stochastic"
    if stochastic and config.state_dtype != "fp16":
        raise Missing(f"flashinfer rounds only fp16 stochastically, not {config.state_dtype}")
    names = [*COMMON, "out"]
    if stochastic:
        names += ["rand_seed", "philox_rounds"]
    if config.state_scale_t:
        names.append("state_scale")
    if config.has_intermediate:
        names += ["disable_state_update", "intermediate_states_buffer",
                  "intermediate_state_indices"]  # fmt: skip
    steps = {"cache_steps": config.ntokens} if config.many else {}
    return _every(problem, function, lambda a: {n: a[n] for n in names if n in a} | steps)


def vllm_ssu(problem: Problem) -> Calls:
    function = _public("vllm", "vllm.model_executor.layers.mamba.ops.mamba_ssm")
    _plain("vllm", problem.config)
    return _every(problem, function, lambda a: {n: a[n] for n in (*COMMON, "out") if n in a})


def mamba_ssm_ssu(problem: Problem) -> Calls:
    """Returns its output: this function has no `out`."""
    function = _public("mamba_ssm", "mamba_ssm.ops.triton.selective_state_update")
    _plain("mamba_ssm", problem.config)
    return _every(problem, function, lambda a: {n: a[n] for n in COMMON if n in a})


GATED = ("q", "k", "v", "A_log", "a", "dt_bias", "b", "use_qk_l2norm")


def _gated(name: str, config: Any) -> None:
    """Raise `Missing` unless a config is what all peers do of gated delta nets: slots of (V, K)
    states, of rows that are equally long, with the gates computed in the kernel."""
    if config.gate != "softplus" or config.kda or not config.has_dt_bias:
        raise Missing(f"{name} is measured with the decay -exp(A_log) softplus(a + dt_bias)")
    if config.rounding == "stochastic":
        raise Missing(f"{name} is measured with rounding to nearest")
    if config.state_layout != "VK" or config.grouped:
        raise Missing(f"{name} is measured with (V, K) states and q, k and v one after another")
    if config.index_dtype is None or config.seqlens_dtype or not config.update_state:
        raise Missing(f"{name} is measured with slots that are read and written, without sequences")
    if config.has_intermediate or (config.has_dst and not config.dst_tokens):
        raise Missing(f"{name} is measured without snapshots and with slots of its own")


def _tokens(arguments: dict[str, Any], many: bool) -> dict[str, Any]:
    """The inputs of a row with an axis of tokens, as `output`, where it has one token too."""
    per_row = {name: arguments[name] for name in ("q", "k", "v", "a", "b")}
    per_row["output"] = arguments["out"]
    if not many:
        per_row = {name: tensor.unsqueeze(1) for name, tensor in per_row.items()}
    return {**{name: arguments[name] for name in GATED}, **per_row}


def flashinfer_gdn(problem: Problem) -> Calls:
    """Where a row starts from an accepted token, its slot is looked up before, out of the time."""
    config: Any = problem.config
    one = "gated_delta_rule_decode_pretranspose"
    function = _public(
        "flashinfer", "flashinfer.gdn_decode", "gated_delta_rule_mtp" if config.many else one
    )
    _gated("flashinfer", config)
    if (config.head_k_dim, config.head_v_dim) != (128, 128):
        raise Missing("flashinfer is measured with K = V = 128")
    if config.many and config.state_dtype != "fp32":
        raise Missing(f"flashinfer has no {config.state_dtype} states for several tokens")
    # With as many, version 0.7.2 leaves its tensors and takes the CUDA context with it.
    states = problem.batch * config.ntokens * problem.nheads
    if states * config.head_k_dim * config.head_v_dim >= 2**31:
        raise Missing("flashinfer counts the elements of a batch's states with 32 bits")

    def take(given: dict[str, Any]) -> dict[str, Any]:
        slots = given["state_batch_indices"]
        pool = {"initial_state": given["state"], "scale": config.head_k_dim**-0.5}
        if config.accepted_dtype:
            column = given["num_accepted_tokens"].long().sub(1).unsqueeze(1)
            slots = slots.gather(1, column)[:, 0]
        # Others are cast in every call, or not taken at all.
        pool["initial_state_indices"] = slots.int()
        if not config.many:
            pool["state"] = None
        else:
            pool["disable_state_update"] = False
            if config.dst_tokens:
                pool["ssm_state_indices"] = given["dst_state_batch_indices"].int()
        return {**_tokens(given, config.many), **pool}

    return _every(problem, function, take)


# The place of vLLM's ops, and that in earlier versions.
VLLM_GATED = ("vllm.third_party.flash_linear_attention.ops", "vllm.model_executor.layers.fla.ops")


def vllm_gdn(problem: Problem) -> Calls:
    config: Any = problem.config
    if config.many or config.accepted_dtype:
        return _vllm_drafts(problem)
    function = _vllm_gated("fused_recurrent_gated_delta_rule_packed_decode")
    _gated("vllm", config)
    packed: Any = problem

    def take(given: dict[str, Any]) -> dict[str, Any]:
        return {
            "mixed_qkv": packed.packed,
            **{n: given[n] for n in ("a", "b", "A_log", "dt_bias")},
            "scale": config.head_k_dim**-0.5,
            "initial_state": given["state"],
            "out": given["out"].unsqueeze(1),
            "ssm_state_indices": given["state_batch_indices"],
            "use_qk_l2norm_in_kernel": config.use_qk_l2norm,
        }

    return _every(problem, function, take)


def _vllm_drafts(problem: Problem) -> Calls:
    """What vLLM verifies drafts with. It allocates its output, and packs q, k and v first."""
    function = _vllm_gated("fused_sigmoid_gating_delta_rule_update")
    config: Any = problem.config
    _gated("vllm", config)
    if not (config.many and config.accepted_dtype and config.dst_tokens):
        raise Missing("vllm takes several tokens with accepted ones and a slot for each")

    def take(given: dict[str, Any]) -> dict[str, Any]:
        return {
            **{n: given[n] for n in ("A_log", "a", "b", "dt_bias", "q", "k", "v")},
            "scale": config.head_k_dim**-0.5,
            "initial_state": given["state"],
            "ssm_state_indices": given["state_batch_indices"],
            "num_accepted_tokens": given["num_accepted_tokens"],
            "use_qk_l2norm_in_kernel": config.use_qk_l2norm,
        }

    # It returns the pool, too.
    return _every(problem, lambda **given: function(**given)[0], take)


def _vllm_gated(name: str) -> Any:
    try:
        return _public("vllm", VLLM_GATED[0], name)
    except Missing:
        return _public("vllm", VLLM_GATED[1], name)


def fla_gdn(problem: Problem) -> Calls:
    """fla has no slots, and returns its states: it is given those of the slots in one tensor, and
    the gates, and the time is without the copies from and to slots that an engine would need."""
    import torch

    from ..reference.gdn import delta_gates

    function = _public("fla", "fla.ops.gated_delta_rule", "fused_recurrent_gated_delta_rule")
    config: Any = problem.config
    _gated("fla", config)
    if config.state_dtype != "fp32":
        raise Missing(f"fla returns fp32 states, not {config.state_dtype}")
    if config.accepted_dtype or config.has_dst:
        raise Missing("fla keeps the state after the last token alone, and knows no accepted ones")
    kept: list[Returned | None] = [None] * problem.sets

    def call(which: int) -> Returned:
        out, states = function(**calls[which])
        # What is returned stays, so that no launch writes where another has just written.
        kept[which] = found = Returned(out, states.transpose(-1, -2))
        return found

    def take(given: dict[str, Any]) -> dict[str, Any]:
        rows = _tokens(given, config.many)
        g, beta = delta_gates(rows["A_log"], rows["a"], rows["dt_bias"], rows["b"])
        states = given["state"][given["state_batch_indices"].long()]
        return {
            **{name: rows[name] for name in ("q", "k", "v")},
            "g": g,
            "beta": beta,
            "scale": config.head_k_dim**-0.5,
            "initial_state": states.transpose(-1, -2).contiguous(),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": config.use_qk_l2norm,
        }

    with torch.no_grad():
        calls = [take(problem.arguments(which)) for which in range(problem.sets)]
    return [functools.partial(call, which) for which in range(problem.sets)]


def vllm_conv1d(problem: Problem) -> Calls:
    function = _public(
        "vllm", "vllm.model_executor.layers.mamba.ops.causal_conv1d", "causal_conv1d_update"
    )
    config: Any = problem.config
    if config.prefill or config.seqlens_dtype:
        raise Missing("vllm is measured with decode, of rows that are equally long")
    if config.index_dtype is None or config.has_dst:
        raise Missing("vllm is measured with slots of which each is read and written")
    if config.counts_dtype or config.depth != config.width - 1:
        raise Missing("vllm has windows that are aligned left alone")
    names = ("x", "conv_state", "weight", "bias", "activation", "conv_state_indices",
             "num_accepted_tokens", "out")  # fmt: skip
    return _every(problem, function, lambda a: {n: a[n] for n in names if n in a})


PEERS: dict[str, dict[str, Adapter]] = {
    "ssu": {"flashinfer": flashinfer_ssu, "vllm": vllm_ssu, "mamba_ssm": mamba_ssm_ssu},
    "gdn": {"flashinfer": flashinfer_gdn, "vllm": vllm_gdn, "fla": fla_gdn},
    "conv1d": {"vllm": vllm_conv1d},
}
NAMES = (OURS, "flashinfer", "vllm", "mamba_ssm", "fla", COPY)
DISTRIBUTIONS = {"flashinfer": "flashinfer-python", "vllm": "vllm", "mamba_ssm": "mamba-ssm",
                 "fla": "flash-linear-attention"}  # fmt: skip


def adapter(name: str, family: str) -> Adapter:
    """The adapter of a contestant of `NAMES` for a family; one that says why it has none."""
    if name == OURS:
        return ours
    if name == COPY:
        return copy
    found = PEERS.get(family, {}).get(name)
    if found is not None:
        return found

    def lacks(problem: Problem) -> Calls:
        raise Missing(f"{name} has nothing for the family {family}")

    return lacks


def forgiven(name: str, problem: Problem) -> float:
    """What a contestant's states, of conv1d outputs, may be off by besides rounding.

    FlashInfer's software rounding flushes what would be an fp16 subnormal to zero. vLLM's
    convolution rounds its products, of numbers up to about 5, to a 16-bit dtype. Both are timed all
    the same, by decision.
    """
    config = problem.config
    if name == "flashinfer" and getattr(config, "rounding", None) == "stochastic":
        return 2.0**-14
    if name == "vllm" and config.family == "conv1d":
        return {"bf16": 2.0**-4, "fp16": 2.0**-7}.get(config.dtype, 0.0)
    return 0.0


def versions() -> dict[str, str]:
    """The versions of the peers that can be imported: of the distribution, else what the module
    says."""
    found = {}
    for name, distribution in DISTRIBUTIONS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            with contextlib.suppress(Exception):
                found[name] = str(importlib.import_module(name).__version__)
    return found
