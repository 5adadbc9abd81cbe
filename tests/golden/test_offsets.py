"""A pool may have more elements than 31 bits count: offsets of slots are products of 64 bits."""

from __future__ import annotations

import re

import pytest
from test_golden import GOLDEN, rendered

from ssmgen import KernelConfig
from ssmgen.families import spec

# Of each family, slots that are read and written, with narrow tables and without, and a buffer.
MORE = {
    "conv1d to another slot": ("conv1d_prefill_right_strided_sm_80", {"has_dst": True}),
    "conv1d without table": ("conv1d_step_bias_sm_90", {"index_dtype": None}),
    "gdn without table": ("gdn_simple_fp32_sm_90", {"index_dtype": None, "has_intermediate": True}),
    "gdn, narrow table": (
        "gdn_simple_fp32_sm_90",
        {"index_dtype": "int32", "has_dst": True, "has_intermediate": True, "entry_dtype": "int32"},
    ),
}


@pytest.mark.parametrize("name", [*GOLDEN, *MORE])
def test_what_multiplies_the_stride_of_a_slot_has_64_bits(name):
    base, more = MORE.get(name, (name, {}))
    plan, arch, fields = GOLDEN[base]
    config = KernelConfig(**{**fields, **more})
    types = {a.name: a.type for a in spec(config.family).arguments(config) if not a.pointer}
    source = rendered(config, plan, arch)
    products = re.findall(r"(\w+) \* (\w+_(?:slot|entry)_stride)\b", source)
    assert products
    for slot, stride in products:
        assert types[stride] == "i64"
        for value in re.findall(rf"^ +{slot} = (.*)$", source, flags=re.MULTILINE):
            assert value.endswith((".to(tl.int64)", ".to(gl.int64)")), f"{slot} = {value}"
