"""Random bits of stochastic rounding: a pure function of seed, slot, head, row, column and token.

Philox-4x32-R of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011); constants and known answers as in the authors' Random123 library. `random_bits` states
which counter an element uses, and every kernel implements that same assignment.
"""

from __future__ import annotations

import torch

from ..errors import ArgumentTypeError, ArgumentValueError

__all__ = ["philox4x32", "random_bits"]

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ELEMENTS_PER_CALL = 8


def philox4x32(
    c0: torch.Tensor,
    c1: torch.Tensor,
    c2: torch.Tensor,
    c3: torch.Tensor,
    k0: torch.Tensor,
    k1: torch.Tensor,
    rounds: int = 10,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32 of the counter `c0..c3` under the key `k0, k1`.

    All six are int64 tensors that hold uint32 values and broadcast together; the four words come
    back in the broadcast shape, as int64 holding uint32 values. ArgumentValueError if `rounds` is
    below 1.
    """
    if rounds < 1:
        raise ArgumentValueError(f"philox rounds must be at least 1, found {rounds}")
    shape = torch.broadcast_shapes(*(word.shape for word in (c0, c1, c2, c3, k0, k1)))
    for _ in range(rounds):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0.expand(shape), c1.expand(shape), c2.expand(shape), c3.expand(shape)


def random_bits(
    seed: int | torch.Tensor,
    slots: torch.Tensor,
    nheads: int,
    dim: int,
    dstate: int,
    rounds: int = 10,
    token: int | torch.Tensor = 0,
    buffer: bool = False,
) -> torch.Tensor:
    """The 16 random bits of every state element of the given slots.

    The key is (low, high) 32 bits of the int64 `seed`. Element (row, col) of a head has flat
    index ``i = row * dstate + col`` and the counter ``(i // 8, token, slot mod 2**32, head)``. Of
    the four words, element ``e = i % 8`` takes word ``e // 2``: bits 15..0 if e is even, bits
    31..16 if e is odd.

    Args:
        seed: an int in the int64 range, or an int64 tensor with one element.
        slots: (n,) integer tensor, the slots that are written.
        nheads, dim, dstate: shape of one slot.
        rounds: Philox rounds, at least 1.
        token: index of the token within its row, one for all slots or a tensor (n,).
        buffer: the slots are entries of the intermediate buffer; the counter then has
            ``2**32 - 1 - head`` for head.

    Returns:
        (n, nheads, dim, dstate) int32 with values in [0, 65536), on the device of `slots`.

    Raises:
        ArgumentTypeError: a seed tensor is not int64.
        ArgumentValueError: the seed has more than one element or does not fit int64; `rounds` is
            below 1.
    """
    device = slots.device
    k0, k1 = _key(seed, device)
    heads = torch.arange(nheads, device=device)
    if buffer:
        heads = _WORD - heads
    elements = dim * dstate
    calls = -(-elements // _ELEMENTS_PER_CALL)
    words = philox4x32(
        torch.arange(calls, device=device),
        torch.as_tensor(token, dtype=torch.int64, device=device).reshape(-1, 1, 1) & _WORD,
        slots.to(torch.int64).reshape(-1, 1, 1) & _WORD,
        heads.reshape(1, -1, 1),
        k0,
        k1,
        rounds,
    )
    halves = torch.stack(
        [half.to(torch.int32) for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1
    )
    return halves.flatten(2)[..., :elements].reshape(len(slots), nheads, dim, dstate)


def _multiply(word: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of the 64-bit product."""
    # word * multiplier does not fit int64; both multipliers lie within 2**30 of 2**32, so
    # word * (multiplier - 2**32) does, and differs by exactly `word` in the high word.
    product = word * (multiplier - (1 << 32))
    return (product >> 32) + word, product & _WORD


def _key(seed: int | torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(seed, torch.Tensor):
        if seed.dtype != torch.int64:
            raise ArgumentTypeError(f"rand_seed must be int64, found {seed.dtype}")
        if seed.numel() != 1:
            raise ArgumentValueError(
                f"rand_seed must have one element, found shape {tuple(seed.shape)}"
            )
        value = seed.reshape(()).to(device)
    else:
        if not -(1 << 63) <= seed < 1 << 63:
            raise ArgumentValueError(f"rand_seed must fit int64, found {seed}")
        value = torch.tensor(seed, dtype=torch.int64, device=device)
    return value & _WORD, (value >> 32) & _WORD
