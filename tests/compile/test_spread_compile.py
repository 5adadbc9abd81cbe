"""The pass that `ssmgen bench` holds drafts against moves 16 bytes at a time, as they do."""

from __future__ import annotations

import re

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmgen.bench import spread


@pytest.mark.parametrize(("aligned", "wide"), [(spread.ALIGNED, True), (1, False)])
def test_rows_of_whole_lines_are_moved_16_bytes_at_a_time(aligned, wide, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {"source": "*fp32", "out": "*fp32", "count": "i32"}
    constants = {"TIMES": 6, "BLOCK": spread.BLOCK}
    divisible = {(i,): [["tt.divisibility", n]] for i, n in enumerate((16, 16, aligned))}
    source = ASTSource(
        spread._rows,
        {**signature, **dict.fromkeys(constants, "constexpr")},
        {(3 + i,): value for i, value in enumerate(constants.values())},
        divisible,
    )
    target = GPUTarget("cuda", 90, 32)
    ptx = triton.compile(source, target=target, options={"num_warps": 1}).asm["ptx"]
    for move in (r"\bld\.global", r"\bst\.global"):
        assert len(re.findall(move, ptx)) > 0
        assert all(("v4" in line) == wide for line in re.findall(rf"{move}\S*", ptx))
