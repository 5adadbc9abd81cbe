"""Legal gdn configs, as a hypothesis strategy."""

from __future__ import annotations

from hypothesis import strategies as st

from ssmgen import KernelConfig

FLOATS = ("fp32", "bf16", "fp16")
INDICES = (None, "int32", "int64")
FLAGS = ("kda", "has_dt_bias", "use_qk_l2norm", "grouped", "aligned", "pdl", "batch_invariant",
         "update_state", "has_intermediate")  # fmt: skip
DTYPES = ("dtype", "state_dtype", "a_dtype", "b_dtype", "a_log_dtype", "dt_bias_dtype")


@st.composite
def gdn_configs(draw, **fixed):
    """Any legal config with the `fixed` fields."""
    fields = {name: draw(st.booleans()) for name in FLAGS}
    fields |= {name: draw(st.sampled_from(FLOATS)) for name in DTYPES}
    fields["state_layout"] = draw(st.sampled_from(("VK", "KV")))
    fields["gate"] = draw(st.sampled_from(("softplus", "bounded", "given")))
    for name in ("head_k_dim", "head_v_dim"):
        fields[name] = draw(st.sampled_from((8, 16, 24, 40, 128)))
    fields["index_dtype"] = draw(st.sampled_from(INDICES))
    fields["ntokens"] = draw(st.sampled_from((1, 1, 2, 4)))
    fields["seqlens_dtype"] = draw(st.sampled_from(INDICES))
    if fields["index_dtype"]:
        fields["accepted_dtype"] = draw(st.sampled_from(INDICES))
        fields["has_dst"] = fields["update_state"] and draw(st.booleans())
        fields["dst_tokens"] = fields["has_dst"] and fields["ntokens"] > 1 and draw(st.booleans())
    if fields["has_intermediate"]:
        fields["entry_dtype"] = draw(st.sampled_from(INDICES))
    stores = fields["update_state"] or fields["has_intermediate"]
    if fields["state_dtype"] != "fp32" and stores and draw(st.booleans()):
        fields["rounding"] = "stochastic"
        fields["philox_rounds"] = draw(st.sampled_from((None, 1, 5, 16)))
    fields["algorithm"] = draw(st.sampled_from(("auto", "simple")))
    return KernelConfig(family="gdn", **{**fields, **fixed})
