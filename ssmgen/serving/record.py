"""What one slot of a pool holds, byte by byte.

A slot is one run of bytes: the conv histories of all layers, their recurrent states, the scales of
those, then the side tables. So whatever copies the run copies all of it, and a side table cannot be
left behind. The parts lie in an order that a checkpoint, too, is a few runs::

    conv ... | state ... scale ... | tables of states | tables of requests | padding
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import ArgumentTypeError, ArgumentValueError

__all__ = ["ALIGNMENT", "LayerSpec", "Record", "Table"]

# Of every layer's tensors and of the slot pitch: a cache line, and enough for any vector access.
ALIGNMENT = 128
_TABLE_ALIGNMENT = 8

_CONVS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SCALED = (torch.int16, torch.int8, torch.float8_e4m3fn)
_STATES = (*_CONVS, *_SCALED)


@dataclass(frozen=True)
class LayerSpec:
    """What one layer keeps in a slot.

    Args:
        state: shape of the recurrent state, such as (nheads, dim, dstate) of Mamba2 or (HV, V, K)
            of a gated delta net; None: the layer has none.
        state_dtype: fp32, bf16, fp16, fp64, or int16, int8, fp8 e4m3, which bring one fp32 scale
            for each row of the last axis.
        conv: (channels, length) of the conv history, length at least ``conv_width - 1`` plus the
            most draft tokens; None: the layer has none.
        conv_dtype: fp32, bf16, fp16 or fp64.
        conv_width: taps of the convolution.
        state_transposed, conv_transposed: the last two axes lie in memory the other way round. The
            view that the pool gives has the same shape, and other strides.

    Raises:
        ArgumentValueError, ArgumentTypeError: a shape, width or dtype that cannot be.
    """

    state: tuple[int, ...] | None = None
    state_dtype: torch.dtype = torch.float32
    conv: tuple[int, int] | None = None
    conv_dtype: torch.dtype = torch.bfloat16
    conv_width: int = 4
    state_transposed: bool = False
    conv_transposed: bool = False

    def __post_init__(self) -> None:
        if self.state is None and self.conv is None:
            raise ArgumentValueError(
                "LayerSpec: found neither state nor conv; allowed: one or both"
            )
        for name, shape, axes in (("state", self.state, "2 or more"), ("conv", self.conv, "2")):
            if shape is None:
                continue
            wrong = len(shape) < 2 or (name == "conv" and len(shape) > 2)
            if wrong or any(type(n) is not int or n < 1 for n in shape):
                raise ArgumentValueError(
                    f"LayerSpec.{name}: found {shape}; allowed: {axes} axes of at least 1"
                )
        if self.state_dtype not in _STATES:
            raise ArgumentTypeError(f"LayerSpec.state_dtype: found {self.state_dtype}; allowed: "
                                    f"{', '.join(map(str, _STATES))}")  # fmt: skip
        if self.conv_dtype not in _CONVS:
            raise ArgumentTypeError(f"LayerSpec.conv_dtype: found {self.conv_dtype}; allowed: "
                                    f"{', '.join(map(str, _CONVS))}")  # fmt: skip
        if self.conv is not None and not 2 <= self.conv_width <= self.conv[1] + 1:
            raise ArgumentValueError(
                f"LayerSpec.conv_width: found {self.conv_width}; allowed: 2 to "
                f"{self.conv[1] + 1}, one more than the history is long"
            )
        if self.scaled and self.state_transposed:
            raise ArgumentValueError(
                f"LayerSpec.state_transposed: found True with a {self.state_dtype} state, whose "
                "scales are of rows; allowed: False"
            )

    @property
    def scaled(self) -> bool:
        """Whether the state has scales."""
        return self.state is not None and self.state_dtype in _SCALED


@dataclass(frozen=True)
class Table:
    """A side table: one small tensor for each slot."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    reset: int | float | bool
    of: str


@dataclass(frozen=True)
class Field:
    """Where a tensor lies in a slot."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, memory: torch.Tensor, pitch: int, slots: int) -> torch.Tensor:
        """(slots, *shape) of an aligned byte tensor of ``slots * pitch``."""
        return self.each(memory, pitch, slots, 0, 1)[:, 0]

    def each(
        self, memory: torch.Tensor, pitch: int, slots: int, step: int, count: int
    ) -> torch.Tensor:
        """(slots, count, *shape): this one and those that follow, `step` bytes apart."""
        size = self.dtype.itemsize
        shape = self.shape
        lies = (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape
        inner = [math.prod(lies[i + 1 :]) for i in range(len(lies))]
        typed = memory.view(self.dtype)
        view = typed.as_strided(
            (slots, count, *lies),
            (pitch // size, step // size, *inner),
            typed.storage_offset() + self.offset // size,
        )
        return view.mT if self.transposed else view


class Record:
    """The layout of a slot: the fields of each layer and table, and the bounds of its parts."""

    def __init__(self, layers: tuple[LayerSpec, ...], tables: tuple[Table, ...] = ()) -> None:
        self.layers, self.tables = layers, tables
        self._end = 0
        self.conv: dict[int, Field] = {}
        # Layers whose histories are alike follow each other, at one distance: a shift of all of
        # them is one strided copy. (first field, distance, count, columns that live).
        self.histories: list[tuple[Field, int, int, int]] = []
        alike: dict[tuple, list[int]] = {}
        for at, layer in enumerate(layers):
            if layer.conv is not None:
                key = (layer.conv, layer.conv_dtype, layer.conv_transposed, layer.conv_width)
                alike.setdefault(key, []).append(at)
        for (shape, dtype, transposed, width), members in alike.items():
            for at in members:
                self.conv[at] = self._add(shape, dtype, transposed)
            first = self.conv[members[0]]
            self.histories.append((first, self._end - self.conv[members[-1]].offset, len(members),
                                   width - 1))  # fmt: skip
        self.states_begin = self._end
        self.state: dict[int, Field] = {}
        self.scale: dict[int, Field] = {}
        for at, layer in enumerate(layers):
            if layer.state is not None:
                self.state[at] = self._add(layer.state, layer.state_dtype, layer.state_transposed)
        for at, layer in enumerate(layers):
            if layer.state is not None and layer.scaled:
                self.scale[at] = self._add(layer.state[:-1], torch.float32)
        self.tables_begin = self._end
        self.table: dict[str, Field] = {}
        for of in ("state", "request"):
            if of == "request":
                self.requests_begin = self._end
            for table in tables:
                if table.of == of:
                    self.table[table.name] = self._add(table.shape, table.dtype,
                                                       alignment=_TABLE_ALIGNMENT)  # fmt: skip
        self.tables_end = self._end
        self.pitch = -(-self._end // ALIGNMENT) * ALIGNMENT

    def _add(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        transposed: bool = False,
        alignment: int = ALIGNMENT,
    ) -> Field:
        field = Field(self._end, tuple(shape), dtype, transposed)
        self._end += -(-field.nbytes // alignment) * alignment
        return field

    @property
    def layout(self) -> object:
        """Equal for records whose bytes mean the same."""
        return self.layers, self.tables

    def too_short(self, columns: int) -> str | None:
        """What is allowed, if a conv history has no column for each of so many slots in a row."""
        for first, _, _, live in self.histories:
            most = first.shape[1] - live + 1
            if columns > most:
                return (
                    f"1 to {most}, as a conv history of length {first.shape[1]} has no more for "
                    f"width {live + 1}"
                )
        return None

    def fresh_tables(self) -> torch.Tensor:
        """The bytes of the side tables of a slot that was just allocated, on the CPU."""
        fresh = torch.zeros(self.tables_end, dtype=torch.uint8)
        for table in self.tables:
            field = self.table[table.name]
            here = fresh[field.offset : field.offset + field.nbytes]
            filled = torch.full(table.shape, table.reset, dtype=table.dtype)
            here.copy_(filled.reshape(-1).view(torch.uint8))
        return fresh[self.tables_begin :]
