"""A gated delta net in plain PyTorch, token by token, with the arguments of ssmgen's ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor


@dataclass(frozen=True)
class Model:
    """Sizes of a gated delta net. K and V differ, so that a layout mix-up cannot fit."""

    layers: int = 2
    H: int = 1
    HV: int = 2
    K: int = 4
    V: int = 6
    width: int = 4

    @property
    def channels(self) -> int:
        """Of the conv: q, k and v, packed."""
        return 2 * self.H * self.K + self.HV * self.V

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens, channels) into q, k (tokens, H, K) and v (tokens, HV, V)."""
        keys = self.H * self.K
        q, k, v = x.split([keys, keys, self.HV * self.V], dim=-1)
        return (q.unflatten(-1, (self.H, self.K)), k.unflatten(-1, (self.H, self.K)),
                v.unflatten(-1, (self.HV, self.V)))  # fmt: skip


class Steps:
    """The ops of a layer, with the arguments of ssmgen's, in plain PyTorch, row by row.

    Each operation on a token has the same shapes and strides however the token is batched, so its
    bits are the same too.
    """

    def causal_conv1d_update(
        self, x: Tensor, conv_state: Tensor, weight: Tensor, *, activation: str, alignment: str,
        conv_state_indices: Tensor, num_accepted_tokens: Tensor, pad_slot_id: int,
        query_start_loc: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x (tokens, channels)."""
        assert (activation, alignment) == ("silu", "left")
        y = torch.zeros_like(x)
        bounds = range(len(x) + 1) if query_start_loc is None else query_start_loc.tolist()
        rows = zip(conv_state_indices.tolist(), num_accepted_tokens.tolist(), bounds, bounds[1:])
        for slot, n, begin, end in rows:
            if slot == pad_slot_id or begin == end:
                continue
            history = conv_state[slot, :, n - 1 : n - 1 + weight.shape[1] - 1]
            window = torch.cat([history, x[begin:end].T], 1)
            y[begin:end] = self.taps(window, weight)
            conv_state[slot, :, : window.shape[1] - 1] = window[:, 1:]
        return y

    def causal_conv1d_fn(
        self, x: Tensor, weight: Tensor, *, conv_states: Tensor, activation: str, alignment: str,
        query_start_loc: Tensor, cache_indices: Tensor, pad_slot_id: int,
        has_initial_state: Tensor, num_accepted_tokens: Tensor,
    ) -> Tensor:  # fmt: skip
        """x (channels, tokens)."""
        assert (activation, alignment) == ("silu", "left")
        y, live = torch.zeros_like(x), weight.shape[1] - 1
        bounds = query_start_loc.tolist()
        rows = zip(cache_indices.tolist(), num_accepted_tokens.tolist(),
                   has_initial_state.tolist(), bounds, bounds[1:])  # fmt: skip
        for slot, n, goes_on, begin, end in rows:
            if slot == pad_slot_id or begin == end:
                continue
            history = conv_states[slot, :, n - 1 : n - 1 + live]
            history = history if goes_on else torch.zeros_like(history)
            window = torch.cat([history, x[:, begin:end]], 1)
            y[:, begin:end] = self.taps(window, weight).T
            conv_states[slot, :, :live] = window[:, -live:]
        return y

    def taps(self, window: Tensor, weight: Tensor) -> Tensor:
        width = weight.shape[1]
        out = []
        for t in range(window.shape[1] - width + 1):
            total = torch.zeros_like(weight[:, 0])
            for tap in range(width):
                total = total + weight[:, tap] * window[:, t + tap]
            out.append(total / (1 + torch.exp(-total)))
        return torch.stack(out)

    def gated_delta_rule_decode(
        self, state: Tensor, q: Tensor, k: Tensor, v: Tensor, A_log: Tensor, a: Tensor,
        dt_bias: Tensor, b: Tensor, *, state_batch_indices: Tensor, dst_state_batch_indices: Tensor,
        pad_slot_id: int, num_accepted_tokens: Tensor | None = None,
        cu_seqlens: Tensor | None = None, cache_steps: int = 1,
    ) -> Tensor:  # fmt: skip
        y = torch.zeros_like(v)
        table, targets = state_batch_indices.tolist(), dst_state_batch_indices.tolist()
        bounds = list(range(len(v) + 1)) if cu_seqlens is None else cu_seqlens.tolist()
        counts = [1] * len(table) if num_accepted_tokens is None else num_accepted_tokens.tolist()
        for row, to, n, begin, end in zip(table, targets, counts, bounds, bounds[1:]):
            source = row if num_accepted_tokens is None else row[n - 1]
            if source == pad_slot_id or begin == end:
                continue
            assert end - begin <= cache_steps
            S = state[source].contiguous()
            for t in range(begin, end):
                S, y[t] = delta_step(S, q[t], k[t], v[t], a[t], b[t], A_log, dt_bias)
                if isinstance(to, list):
                    state[to[t - begin]] = S
            if not isinstance(to, list):
                state[to] = S
        return y


def delta_step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of the gated delta rule (Yang, Kautz and Hatamizadeh, "Gated Delta Networks",
    2024), S (HV, V, K): decay, correct S k towards v, read S q."""
    ratio = len(v) // len(q)
    q, k = (t.repeat_interleave(ratio, 0)[:, None] for t in (q, k))
    q, k = (t / torch.sqrt((t * t).sum(-1, keepdim=True) + 1e-6) for t in (q, k))
    gate = a + dt_bias
    softplus = gate.clamp(min=0) + torch.log1p(torch.exp(-gate.abs()))
    S = torch.exp(-torch.exp(A_log) * softplus)[:, None, None] * S
    beta = 1 / (1 + torch.exp(-b))
    S = S + (beta[:, None] * (v - (S * k).sum(-1)))[..., None] * k
    return S, (S * q).sum(-1) / q.shape[-1] ** 0.5
