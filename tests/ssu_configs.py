"""Legal ssu configs, as a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

from ssmgen import KernelConfig

FLOATS = ("fp32", "bf16", "fp16")
SCALED = ("int16", "int8", "fp8_e4m3fn")
STATES = (*FLOATS, *SCALED)
INDICES = (None, "int32", "int64")
SIZES = tuple(range(8, 513, 8))


@st.composite
def configs(draw, **fixed):
    """Any legal config with the `fixed` fields."""
    flags = ("has_z", "has_d", "has_dt_bias", "dt_softplus", "tie_hdim", "aligned", "pdl")
    fields = {name: draw(st.booleans()) for name in (*flags, "batch_invariant")}
    for name in ("dtype", "weight_dtype", "a_dtype"):
        fields[name] = draw(st.sampled_from(FLOATS))
    fields["dt_dtype"] = draw(st.sampled_from((None, *FLOATS)))
    fields["dim"], fields["dstate"] = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    fields["index_dtype"] = draw(st.sampled_from((None, "int32", "int64")))
    state = fields["state_dtype"] = fixed.get("state_dtype") or draw(st.sampled_from(STATES))
    fields["update_state"] = draw(st.booleans())
    fields["has_dst"] = (
        bool(fields["index_dtype"]) and fields["update_state"] and draw(st.booleans())
    )
    if draw(st.booleans()):
        fields["ntokens"] = draw(st.sampled_from((1, 2, 6, 17)))
        fields["seqlens_dtype"] = draw(st.sampled_from(INDICES))
        fields["parents_dtype"] = draw(st.sampled_from(INDICES))
        fields["accepted_dtype"] = fields["index_dtype"] and draw(st.sampled_from(INDICES))
        fields["has_intermediate"] = draw(st.booleans())
        fields["entry_dtype"] = draw(
            st.sampled_from(INDICES if fields["has_intermediate"] else (None,))
        )
        fields["dst_tokens"] = fields["has_dst"] and fields["ntokens"] > 1 and draw(st.booleans())
    stores = fields["update_state"] or fields.get("has_intermediate")
    if state != "fp32" and stores and draw(st.booleans()):
        fields["rounding"] = "stochastic"
        fields["philox_rounds"] = draw(st.sampled_from((None, 1, 5, 7, 16)))
    fields["precision"] = draw(st.sampled_from(("fast", "exact")))
    algorithms = ["auto", "simple", "vertical", *([] if state in SCALED else ["horizontal"])]
    many = KernelConfig(**{**fields, **fixed})
    if many.many:
        algorithms = ["auto", "simple", *([] if many.outside_matrix() else ["matrix"])]
    fields["algorithm"] = draw(st.sampled_from(algorithms))
    return KernelConfig(**{**fields, **fixed})
