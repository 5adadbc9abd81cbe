"""Which cells a section measures. A cell is one config at one size; nothing here needs a GPU."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import KernelConfig
from ..errors import ConfigError
from ..families.conv1d.config import Conv1dConfig
from ..families.gdn.config import GdnConfig
from ..families.ssu.config import SsuConfig

__all__ = ["AXES", "GRIDS", "ODD_BATCHES", "ODD_HEADS", "ODD_SHAPES", "SECTIONS", "WRITTEN", "Cell",
           "Grid", "Wanted", "config_of", "gdn_config", "key_heads", "parse_state"]  # fmt: skip

SHAPES = ((128, 64), (16, 64), (128, 80))  # nheads, dim
STATES = (
    "fp32",
    "bf16",
    "fp16",
    "fp16 + SR 10",
    "fp16 + SR 5",
    "bf16 + SR 10",
    "int16",
    "int16 + SR 10",
    "int8",
    "int8 + SR 10",
    "fp8_e4m3fn",
    "fp8_e4m3fn + SR 10",
)
BATCHES = (1, 4, 16, 64, 256, 1024)
TOKENS = (2, 4, 6, 8)
# None of these is a size that ``ssmgen tune`` measures at by itself: is there a cliff between them?
ODD_BATCHES = (3, 7, 24, 37, 96, 200, 600)
ODD_HEADS = (24, 48, 80)
ODD_SHAPES: tuple[dict[str, int], ...] = (
    {},
    {"dim": 80},
    {"dim": 96},
    {"dstate": 96},
    {"dstate": 256},
)
WRITES = ("last only", "every token")
# As people type them.
WRITTEN = {"last": WRITES[0], "every": WRITES[1]}
# Value heads of a gated delta net to its key heads: Qwen3-Next's, those of its larger relatives,
# and what four GPUs have of each.
KEY_HEADS = {32: 16, 48: 16, 64: 16, 8: 4, 12: 4, 16: 4}
# Channels of the convolutions before those: q, k and v with heads of 128.
CHANNELS = tuple((2 * k + v) * 128 for v, k in KEY_HEADS.items())
# Plain decode, and a step that verifies three drafts.
STEPS = (1, 4)
# How the cost of one kernel grows: what is varied, what the other sizes are then.
AXES: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "heads": (8, 16, 24, 32, 48, 64, 80, 96, 128, 256),
    "dim": (16, 32, 48, 64, 80, 96, 128, 192, 256),
    "dstate": (16, 32, 64, 96, 128, 192, 256),
    "tokens": (1, 2, 3, 4, 6, 8, 12, 16),
}
BASE = {"batch": 64, "heads": 64, "dim": 64, "dstate": 128, "tokens": 1}


@dataclass(frozen=True)
class Cell:
    """One config at one size. `key` is what tables call it; `shape` what the config leaves open."""

    config: KernelConfig
    batch: int
    nheads: int
    key: tuple[tuple[str, Any], ...]
    shape: tuple[tuple[str, int], ...] = ()

    @property
    def name(self) -> str:
        """The cell on one line."""
        return ", ".join(
            str(value) if isinstance(value, str) else f"{name} {value}" for name, value in self.key
        )


@dataclass(frozen=True)
class Wanted:
    """Which part of a grid is wanted; None is what the grid has by itself."""

    heads: tuple[int, ...] | None = None
    dims: tuple[int, ...] | None = None
    states: tuple[str, ...] | None = None
    batches: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    writes: tuple[str, ...] | None = None
    quick: bool = False

    def takes(self, cell: dict[str, Any]) -> bool:
        """Whether a measured cell is among what is wanted."""
        named = {"heads": self.heads, "dim": self.dims, "state": self.states,
                 "batch": self.batches, "tokens": self.tokens,
                 "writes": self.writes}  # fmt: skip
        return all(
            allowed is None or name not in cell or cell[name] in allowed
            for name, allowed in named.items()
        )


def state_label(state: str, rounds: int) -> str:
    """What tables call a state dtype with its rounds of Philox; 0 rounds is to nearest."""
    return f"{state} + SR {rounds}" if rounds else state


def parse_state(text: str) -> str:
    """The label of a state as people type it: fp16, fp16+sr, fp16+sr5. Raises `ConfigError`."""
    match = re.fullmatch(r"(\w+?)(?:\+sr(\d*))?", text.lower().replace(" ", ""))
    if match is None:
        raise ConfigError(f"state: {text!r} found; allowed: a dtype, or one with +sr or +sr5")
    name, rounds = match.groups()
    label = state_label(name, 0 if rounds is None else int(rounds or 10))
    config_of(label)
    return label


def config_of(label: str, **fields: Any) -> SsuConfig:
    """The config of a state's label."""
    return SsuConfig(**_state(label), **fields)


def gdn_config(label: str, tokens: int = 1, **fields: Any) -> GdnConfig:
    """The config of a state's label in a gated delta net. With several tokens it is that of a step
    that verifies drafts: a row starts from the last accepted token of the step before, and each
    token has a slot of its own."""
    if tokens > 1:
        fields |= {"ntokens": tokens, "has_dst": True, "dst_tokens": True,
                   "accepted_dtype": "int32"}  # fmt: skip
    return GdnConfig(**_state(label), **fields)


def _state(label: str) -> dict[str, Any]:
    state, _, rounds = label.partition(" + SR ")
    nearest: dict[str, Any] = {"state_dtype": state}
    if not rounds:
        return nearest
    return {**nearest, "rounding": "stochastic", "philox_rounds": int(rounds)}


def key_heads(nheads: int) -> int:
    """Key heads of a gated delta net with so many value heads: those of `KEY_HEADS`, else half of
    them, or as many if that is no number."""
    return KEY_HEADS.get(nheads, nheads if nheads % 2 else nheads // 2)


def _pick(wanted: Sequence[Any] | None, whole: Iterable[Any], quick: Iterable[Any] | None) -> Any:
    if wanted is not None:
        return wanted
    return tuple(whole if quick is None else quick)


def ssu(wanted: Wanted) -> list[Cell]:
    """One token a row: state dtypes and roundings by batch, at three shapes of a layer."""
    quick = wanted.quick
    if wanted.heads or wanted.dims:
        shapes = tuple(itertools.product(wanted.heads or (128,), wanted.dims or (64,)))
    else:
        shapes = SHAPES[:1] if quick else SHAPES
    states = _pick(wanted.states, STATES, ("fp32", "fp16", "fp16 + SR 10") if quick else None)
    batches = _pick(wanted.batches, BATCHES, (1, 16, 256) if quick else None)
    return [
        Cell(
            config_of(state, dim=dim), batch, heads,
            (("heads", heads), ("dim", dim), ("state", state), ("batch", batch)),
        )
        for (heads, dim), state, batch in itertools.product(shapes, states, batches)
    ]  # fmt: skip


def tokens(wanted: Wanted) -> list[Cell]:
    """Several tokens a row: the state written after the last one, or each into a buffer."""
    quick = wanted.quick
    heads = _pick(wanted.heads, (128, 16), (128,) if quick else None)
    states = _pick(wanted.states, ("fp32", "fp16", "bf16"), ("fp16",) if quick else None)
    counts = _pick(wanted.tokens, TOKENS, (4,) if quick else None)
    batches = _pick(wanted.batches, BATCHES, (1, 16, 256) if quick else None)
    cells = []
    for n, writes, state, count, batch in itertools.product(
        heads, wanted.writes or WRITES, states, counts, batches
    ):  # fmt: skip
        # With every token's state in the buffer the slot stays as it was: so drafts are verified.
        every = writes == "every token"
        config = config_of(
            state, ntokens=count, has_intermediate=every, update_state=not every,
            entry_dtype="int64" if every else None,
        )  # fmt: skip
        key = {"heads": n, "writes": writes, "state": state, "tokens": count, "batch": batch}
        cells.append(Cell(config, batch, n, tuple(key.items())))
    return cells


def odd(wanted: Wanted) -> list[Cell]:
    """One token a row, between the sizes and shapes that plans are tuned at."""
    quick = wanted.quick
    states = _pick(wanted.states, ("fp32", "fp16"), ("fp16",) if quick else None)
    heads = _pick(wanted.heads, ODD_HEADS, ODD_HEADS[1:2] if quick else None)
    batches = _pick(wanted.batches, ODD_BATCHES, ODD_BATCHES[1::2] if quick else None)
    cells = []
    for n, shape, state, batch in itertools.product(heads, ODD_SHAPES, states, batches):
        config = config_of(state, **shape)
        key = {"heads": n, "dim": config.dim, "dstate": config.dstate, "state": state,
               "batch": batch}  # fmt: skip
        cells.append(Cell(config, batch, n, tuple(key.items())))
    return cells


def scaling(wanted: Wanted) -> list[Cell]:
    """One size varied at a time."""
    states = _pick(wanted.states, ("fp16",), None)
    cells = []
    for state, (axis, values) in itertools.product(states, AXES.items()):
        for value in values[:: 3 if wanted.quick else 1]:
            sizes = {**BASE, axis: value}
            config = config_of(
                state, dim=sizes["dim"], dstate=sizes["dstate"], ntokens=sizes["tokens"]
            )
            key = (("axis", axis), ("state", state), ("value", value))
            cells.append(Cell(config, sizes["batch"], sizes["heads"], key))
    return cells


def gdn(wanted: Wanted) -> list[Cell]:
    """Gated delta nets with K = V = 128: one token a row, and the verification of drafts."""
    quick = wanted.quick
    heads = _pick(wanted.heads, KEY_HEADS, (32,) if quick else None)
    states = _pick(wanted.states, ("fp32", "bf16"), None)
    counts = _pick(wanted.tokens, STEPS, (1,) if quick else None)
    batches = _pick(wanted.batches, BATCHES, (1, 16, 256) if quick else None)
    return [
        Cell(
            gdn_config(state, count), batch, n,
            (("k_heads", key_heads(n)), ("heads", n), ("state", state), ("tokens", count),
             ("batch", batch)),
            (("k_heads", key_heads(n)),),
        )
        for n, state, count, batch in itertools.product(heads, states, counts, batches)
    ]  # fmt: skip


def conv1d(wanted: Wanted) -> list[Cell]:
    """The convolutions ahead of those: width 4, bf16; several tokens with accepted ones. With PDL,
    with which vLLM, too, launches its own."""
    quick = wanted.quick
    dims = _pick(wanted.dims, CHANNELS, CHANNELS[:1] if quick else None)
    counts = _pick(wanted.tokens, STEPS, (1,) if quick else None)
    batches = _pick(wanted.batches, BATCHES, (1, 16, 256) if quick else None)
    cells = []
    for dim, count, batch in itertools.product(dims, counts, batches):
        many = count > 1
        config = Conv1dConfig(
            many=many, accepted_dtype="int32" if many else None, aligned=dim % 8 == 0, pdl=True
        )
        key = {"dim": dim, "tokens": count, "batch": batch}
        cells.append(Cell(config, batch, dim, tuple(key.items()), (("tokens", count),)))
    return cells


Part = tuple[str, Callable[[dict[str, Any]], bool]]


@dataclass(frozen=True)
class Grid:
    """A section that is made of cells: which, and how they are shown.

    Tables are split by `group` and have the columns `columns` before the floor; `means` are the
    parts of a table that have a mean each: what they are called, and which cells they are. A
    picture has a row of panels for each value of `panels`, over `over`. `heeds`: the options that
    choose cells.
    """

    cells: Callable[[Wanted], list[Cell]]
    group: tuple[str, ...]
    columns: tuple[str, ...]
    panels: str
    heeds: tuple[str, ...]
    means: tuple[Part, ...] = ()
    over: str = "batch"


STEP_MEANS: tuple[Part, ...] = (
    (", one token", lambda cell: cell["tokens"] == 1),
    (", several tokens", lambda cell: cell["tokens"] > 1),
)
GRIDS = {
    "ssu": Grid(
        ssu,
        ("heads", "dim"),
        ("state", "batch"),
        "state",
        ("heads", "dims", "states", "batches"),
        (
            (", nearest", lambda cell: "SR" not in cell["state"]),
            (", stochastic", lambda cell: "SR" in cell["state"]),
        ),
    ),
    "tokens": Grid(
        tokens,
        ("heads", "writes"),
        ("state", "tokens", "batch"),
        "tokens",
        ("heads", "states", "batches", "tokens", "writes"),
        (
            ("", lambda cell: True),
            (", from batch 16 up", lambda cell: cell["batch"] >= 16),
        ),
    ),
    "odd": Grid(
        odd,
        ("heads", "dim", "dstate"),
        ("state", "batch"),
        "state",
        ("heads", "states", "batches"),
        (("", lambda cell: True),),
    ),
    "scaling": Grid(scaling, ("axis", "state"), ("value",), "state", ("states",), over="value"),
    "gdn": Grid(
        gdn,
        ("k_heads", "heads"),
        ("state", "tokens", "batch"),
        "tokens",
        ("heads", "states", "batches", "tokens"),
        STEP_MEANS,
    ),
    "conv1d": Grid(
        conv1d,
        ("dim",),
        ("tokens", "batch"),
        "tokens",
        ("dims", "batches", "tokens"),
        STEP_MEANS,
    ),
}
SECTIONS = ("ssu", "tokens", "gdn", "conv1d", "chain", "host", "jit", "odd", "scaling")
