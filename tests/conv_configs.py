"""Legal conv1d configs that a call can ask for, as a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

from ssmgen import KernelConfig

FLOATS = ("fp32", "bf16", "fp16")
INDICES = (None, "int32", "int64")
FLAGS = ("has_bias", "packed_channels", "aligned", "pdl", "batch_invariant")


@st.composite
def conv_configs(draw, **fixed):
    """Any legal config with the `fixed` fields that some call asks for."""
    fields = {name: draw(st.booleans()) for name in FLAGS}
    for name in ("dtype", "weight_dtype"):
        fields[name] = draw(st.sampled_from(FLOATS))
    fields["state_dtype"] = draw(st.sampled_from((fields["dtype"], "fp32")))
    fields["width"] = draw(st.integers(2, 6))
    fields["activation"] = draw(st.sampled_from(("silu", None)))
    fields["many"] = draw(st.booleans())
    fields["prefill"] = fields["many"] and draw(st.booleans())
    if fields["prefill"]:
        fields["history"] = draw(st.sampled_from(("pool", "rows", None)))
        # A pool is written where there is one, and read where flags say which rows have a past.
        fields["has_initial"] = fields["history"] == "pool"
        fields["update_state"] = fields["history"] == "pool" or draw(st.booleans())
    pool = fields.get("update_state", True)
    fields["index_dtype"] = draw(st.sampled_from(INDICES)) if pool else None
    fields["seqlens_dtype"] = draw(st.sampled_from(INDICES)) if fields["many"] else None
    forms = ["plain", *(["deep"] if pool else []), *(["dst"] if fields["index_dtype"] else [])]
    if not fields["prefill"]:
        forms += ["accepted", "counts"]
    form = draw(st.sampled_from(forms))
    if form == "deep":
        fields["depth"] = draw(st.integers(fields["width"], 8))
    fields["has_dst"] = form == "dst"
    for name in ("accepted", "counts"):
        if form == name:
            fields[f"{name}_dtype"] = draw(st.sampled_from(INDICES[1:]))
    return KernelConfig(family="conv1d", **{**fields, **fixed})
