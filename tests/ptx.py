"""The inline assembly of a rendered kernel, carried out in NumPy: what a GPU makes of it."""

from __future__ import annotations

import re

import numpy as np

WORD = re.compile(r"^(?:\$\d+|[a-z]\d+)$")


def assembly(source: str, function: str) -> tuple[list[str], int]:
    """The instructions of the one assembly in `function`, and how many elements it takes."""
    body = source.partition(f"def {function}(")[2]
    text, _, rest = body.partition('"""')[2].partition('"""')
    lines = [line.strip(" {}\n") for line in text.split(";")]
    pack = re.search(r"pack=(\d+)", rest)
    assert pack
    return [line for line in lines if line and not line.startswith(".reg")], int(pack[1])


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c of fp32, rounded once: in fp64 to odd, which a second rounding cannot mislead."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0)
    bits = np.where(even, bits + np.where((error > 0) == (total > 0), 1, -1), bits)
    return bits.view(np.float64).astype(np.float32)


def permuted(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(both)
    for i in range(4):
        byte = both >> np.uint64(8 * (selector >> 4 * i & 7)) & np.uint64(255)
        found |= byte << np.uint64(8 * i)
    return found.astype(np.uint32)


def chosen(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    found = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            found |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return found


def rounded_down(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    total = a.astype(np.float64) + b.astype(np.float64)
    nearest = total.astype(np.float32)
    return np.where(nearest > total, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def run(source: str, function: str, *operands: np.ndarray) -> np.ndarray:
    """What `function` gives for `operands` of 32 bits an element: the bytes of its registers."""
    lines, pack = assembly(source, function)
    registers: dict[str, np.ndarray] = {}
    for i, operand in enumerate(operands):
        for j in range(pack):
            values = np.ascontiguousarray(operand.reshape(-1, pack)[:, j])
            registers[f"${1 + i * pack + j}"] = values.view(np.uint32)
    size = len(registers["$1"])

    def value(text: str) -> np.ndarray:
        if WORD.match(text):
            return registers[text]
        number = int(text[2:], 16) if text.startswith("0f") else int(text, 0)
        return np.full(size, number, np.uint32)

    for line in lines:
        name, _, rest = line.partition(" ")
        target, *given = [part.strip() for part in rest.split(",")]
        if name == "prmt.b32":
            registers[target] = permuted(value(given[0]), value(given[1]), int(given[2], 0))
        elif name == "lop3.b32":
            *words, table = given
            registers[target] = chosen(*map(value, words), int(table, 0))
        elif name == "mad.lo.u32":
            a, b, c = map(value, given)
            registers[target] = a * b + c
        else:
            floats = [value(part).view(np.float32) for part in given]
            registers[target] = {
                "fma.rn.f32": fused,
                "add.rm.f32": rounded_down,
                "sub.rn.f32": np.subtract,
                "mul.rn.f32": np.multiply,
                "abs.f32": np.abs,
            }[name](*floats).view(np.uint32)
    return registers["$0"].view(np.uint8)
