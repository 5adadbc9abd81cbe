"""What a plan costs, estimated: bytes, instructions, registers, waves. For GPUs without a table.

A program moves bytes, issues instructions and waits; programs fill the GPU in waves. Memory, issue
and waiting hide each other where there are several waves, and add up where there is one. The
constants are those of one GPU, found by ``benchmarks/fit.py`` so that the estimates of one plan are
off by the same factor everywhere, which a list of plans then has; the other architectures differ in
the numbers of `MACHINES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arch import Arch

__all__ = [
    "CONSTANTS",
    "FITTED",
    "MACHINES",
    "Constants",
    "Machine",
    "Work",
    "estimate",
    "evenly",
    "resident",
]

# The architecture of the GPU whose times the constants were found from.
FITTED = 90

# A multiprocessor has four parts, each with 16K registers of 32 bits, on every architecture here.
PARTS, REGISTERS = 4, 16384


@dataclass(frozen=True)
class Work:
    """What a plan makes one program do.

    ``programs`` a head; ``warps`` a program; ``bytes`` a head moves to and from memory;
    ``registers`` a thread; ``shared`` bytes a program; ``prologue`` instructions a thread issues
    before its first tile and ``instructions`` a tile; ``steps`` tiles, one after the other, of
    which the next is already on its way if ``ahead``.
    """

    programs: float
    warps: int
    bytes: float
    registers: float
    prologue: float
    instructions: float
    steps: float = 1
    ahead: bool = False
    shared: float = 0


@dataclass(frozen=True)
class Machine:
    """One GPU of an architecture: multiprocessors, bytes a microsecond of an in-place pass, clocks
    a microsecond, and what one multiprocessor holds."""

    sms: int
    bandwidth: float
    clock: float
    warps: int
    programs: int


# A100, A40, L40S, H200 (measured), B200, B300, RTX 5090, GB10; 88% of the memory's data sheet.
MACHINES = {
    80: Machine(108, 1.79e6, 1410, 64, 32),
    86: Machine(84, 0.61e6, 1740, 48, 16),
    89: Machine(142, 0.76e6, 2520, 48, 24),
    90: Machine(132, 4.24e6, 1700, 64, 32),
    100: Machine(148, 7.0e6, 1900, 64, 32),
    103: Machine(148, 7.0e6, 1900, 64, 32),
    120: Machine(170, 1.58e6, 2400, 48, 24),
    121: Machine(48, 0.24e6, 2400, 48, 24),
}


@dataclass(frozen=True)
class Constants:
    """Microseconds, but for ``repeated`` (how much of what the first tile waits for its
    ``dependent`` instructions each later one does), ``hiding`` (the exponent of the mean; more
    hides better) and ``tail`` (how much of its last wave a launch waits for)."""

    launch: float = 1.81
    program: float = 0.000332
    wait: float = 0.314
    tile: float = 0.24
    tile_ahead: float = 0.0973
    dependent: float = 0.000736
    repeated: float = 0.367
    hiding: float = 1.92
    tail: float = 1.44


CONSTANTS = Constants()


# Written so that they take arrays too: the fit runs the very same formula over every measurement.
def _most(a: Any, b: Any) -> Any:
    return (a + b + abs(a - b)) / 2


def _least(a: Any, b: Any) -> Any:
    return (a + b - abs(a - b)) / 2


def _up(a: Any) -> Any:
    return -(-a // 1)


def resident(work: Work, arch: Arch) -> Any:
    """Programs that one multiprocessor holds at a time; 0 if none fits."""
    machine = MACHINES[arch.cc]
    registers = _up(work.registers / 8) * 8
    # A warp has all of its registers in one part.
    warps = _least(machine.warps, PARTS * (REGISTERS / (registers * 32) // 1))
    found = _least(machine.programs, warps / work.warps)
    # A kilobyte of a program's shared memory is the system's.
    found = _least(found, (arch.shared_memory + 1024) / (work.shared + 1024))
    return found // 1


def evenly(work: Work) -> Any:
    """Programs that give each part of a multiprocessor as many warps: with one more, one of them
    has more to issue than the others."""
    return _most(1, PARTS / work.warps)


def estimate(work: Work, arch: Arch, c: Constants = CONSTANTS) -> Callable[[Any], Any]:
    """A function of batch x heads: the microseconds of one launch."""
    machine = MACHINES[arch.cc]
    at_once = machine.sms * _most(resident(work, arch), 1)
    issued = work.programs * work.warps * (work.prologue + work.steps * work.instructions)
    issued = issued / (PARTS * machine.sms * machine.clock)
    fill = machine.sms * evenly(work)
    moved = work.bytes / machine.bandwidth
    busy = c.dependent * work.instructions
    between = c.repeated * busy + c.tile + work.ahead * (c.tile_ahead - c.tile)
    waiting = c.wait + busy + (work.steps - 1) * between
    power = c.hiding

    def microseconds(heads: Any) -> Any:
        programs = work.programs * heads
        waves = programs / at_once
        last = (_up(waves) - waves) * _least(1, 1 / waves)
        more = _most(1, waves + c.tail * last) - 1
        share = programs / fill
        issue = issued * heads * _least(4, _up(share) / share)
        memory = moved * heads
        hidden = (
            memory**power
            + issue**power
            + (more * waiting) ** power
            + (c.program * programs) ** power
        ) ** (1 / power)
        return c.launch + waiting + hidden

    return microseconds
