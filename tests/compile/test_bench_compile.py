"""The convolution of ``ssmgen bench chain`` compiles for every architecture that launches it."""

from __future__ import annotations

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmgen.bench.chain import conv_update

POINTERS = {"xin": "*bf16", "pool": "*bf16", "weight": "*bf16", "xout": "*bf16", "slots": "*i64"}


@pytest.mark.parametrize(("cc", "pdl"), [(80, False), (90, False), (90, True), (120, True)])
def test_conv_of_the_chain_compiles_and_waits_only_with_pdl(cc, pdl, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {**POINTERS, "slot_stride": "i32"}
    constants = {"WIDTH": 1280, "BLOCK": 256, "PDL": pdl}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(conv_update, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", cc, 32))
    assert ("griddepcontrol.wait" in built.asm["ptx"]) == pdl
    assert ("griddepcontrol.launch_dependents" in built.asm["ptx"]) == pdl
