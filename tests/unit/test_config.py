"""KernelConfig: what may be asked for, and that asking twice is asking for the same."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ssu_configs import FLOATS, SCALED, configs

from ssmgen import Arch, KernelConfig
from ssmgen.config import SCHEMA
from ssmgen.errors import ConfigError, ConfigTypeError, SsmgenError
from ssmgen.families.ssu import SsuConfig
from ssmgen.plan import dispatch
from ssmgen.template import key

ROOT = Path(__file__).parents[2]

KNOWN = {
    "dtype": "fp16",
    "state_dtype": "int8",
    "rounding": "stochastic",
    "philox_rounds": 7,
    "dim": 80,
    "dstate": 256,
    "has_z": True,
    "index_dtype": "int32",
}
KNOWN_JSON = (
    '{"a_dtype":"fp32","accepted_dtype":null,"algorithm":"auto","aligned":true,'
    '"batch_invariant":false,"dim":80,"dst_tokens":false,"dstate":256,"dt_dtype":"fp32",'
    '"dt_softplus":true,"dtype":"fp16","entry_dtype":null,"family":"ssu","has_d":true,'
    '"has_dst":false,"has_dt_bias":true,"has_intermediate":false,"has_z":true,'
    '"index_dtype":"int32","ntokens":1,"parents_dtype":null,"pdl":false,"philox_rounds":7,'
    '"precision":"fast",'
    '"rounding":"stochastic","schema":1,"seqlens_dtype":null,'
    '"state_dtype":"int8","state_scale_t":"fp32","tie_hdim":true,"update_state":true,'
    '"weight_dtype":"fp32"}'
)
KNOWN_HASH = "d7ad4961775d6199b066300dd34cf2df26179aadc7c89fb35aed353d43e1fa99"


def test_dtype_state_dtype_dim_and_dstate_are_enough_to_start():
    config = KernelConfig(dtype="bf16", state_dtype="fp16", dim=64, dstate=128)
    assert type(config) is SsuConfig
    assert config == SsuConfig(dtype="bf16", state_dtype="fp16", dim=64, dstate=128)


def test_config_is_frozen():
    config = KernelConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 128
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.dim


def test_config_takes_keywords_only():
    for cls in (KernelConfig, SsuConfig):
        with pytest.raises(TypeError):
            cls("ssu")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        (torch.bfloat16, "bf16"),
        ("torch.bfloat16", "bf16"),
        ("bfloat16", "bf16"),
        ("bf16", "bf16"),
        (torch.float16, "fp16"),
        (torch.half, "fp16"),
        ("half", "fp16"),
        (torch.float32, "fp32"),
        ("float", "fp32"),
    ],
)
def test_every_spelling_of_a_dtype_is_the_same_config(spelling, name):
    assert KernelConfig(dtype=spelling) == KernelConfig(dtype=name)
    assert KernelConfig(dtype=spelling).dtype == name


def test_state_and_index_dtypes_are_torch_dtypes_or_names():
    for dtype in (torch.float8_e4m3fn, "float8_e4m3fn", "fp8_e4m3fn"):
        assert KernelConfig(state_dtype=dtype).state_dtype == "fp8_e4m3fn"
    for dtype in (torch.int32, "int32", "int"):
        assert KernelConfig(index_dtype=dtype).index_dtype == "int32"


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"family": "gru"}, ConfigError, ("family", "'gru'", "ssu")),
        ({"dtype": "fp64"}, ConfigError, ("dtype", "fp64", "bf16, fp16, fp32")),
        ({"dtype": None}, ConfigError, ("dtype", "None", "bf16, fp16, fp32")),
        ({"dtype": 1}, ConfigError, ("dtype", "1", "bf16, fp16, fp32")),
        ({"state_dtype": "fp4"}, ConfigError, ("state_dtype", "'fp4'", "int8, fp8_e4m3fn")),
        ({"weight_dtype": "int8"}, ConfigError, ("weight_dtype", "'int8'", "fp32")),
        ({"a_dtype": torch.int32}, ConfigError, ("a_dtype", "'int32'", "fp32")),
        ({"dt_dtype": "fp8_e4m3fn"}, ConfigError, ("dt_dtype", "'fp8_e4m3fn'", "None")),
        ({"index_dtype": "int16"}, ConfigError, ("index_dtype", "'int16'", "int32, int64, None")),
        ({"algorithm": "diagonal"}, ConfigError, ("algorithm", "'diagonal'", "auto, simple")),
        ({"algorithm": True}, ConfigError, ("algorithm", "True", "auto, simple")),
        ({"rounding": "up"}, ConfigError, ("rounding", "'up'", "nearest, stochastic")),
        ({"dim": 0}, ConfigError, ("dim", "0", "8 to 512 in multiples of 8")),
        ({"dim": 12}, ConfigError, ("dim", "12", "8 to 512 in multiples of 8")),
        ({"dim": 520}, ConfigError, ("dim", "520", "8 to 512 in multiples of 8")),
        ({"dstate": 4}, ConfigError, ("dstate", "4", "8 to 512 in multiples of 8")),
        ({"dim": None}, ConfigTypeError, ("dim", "None", "8 to 512 in multiples of 8")),
        ({"dim": 64.0}, ConfigTypeError, ("dim", "64.0", "8 to 512 in multiples of 8")),
        ({"dim": True}, ConfigTypeError, ("dim", "True", "8 to 512 in multiples of 8")),
        ({"ntokens": 0}, ConfigError, ("ntokens", "0", "1 to 1048576")),
        ({"ntokens": None}, ConfigTypeError, ("ntokens", "None", "1")),
        ({"philox_rounds": 17}, ConfigError, ("philox_rounds", "17", "0 to 16")),
        ({"has_z": 1}, ConfigTypeError, ("has_z", "1", "True, False")),
        ({"pdl": None}, ConfigTypeError, ("pdl", "None", "True, False")),
        ({"head_dim": 64}, ConfigTypeError, ("head_dim", "fields", "dstate")),
        ({"_families": {}}, ConfigTypeError, ("_families", "fields", "dstate")),
    ],
)
def test_an_error_names_the_field_the_value_and_what_is_allowed(fields, error, words):
    with pytest.raises(error) as caught:
        KernelConfig(**fields)
    assert isinstance(caught.value, SsmgenError)
    assert isinstance(caught.value, TypeError if error is ConfigTypeError else ValueError)
    assert all(word in str(caught.value) for word in words), str(caught.value)


ILLEGAL = [
    ({"rounding": "stochastic", "state_dtype": "fp32"}, "rounding"),
    ({"rounding": "stochastic", "state_dtype": "fp16", "update_state": False}, "rounding"),
    ({"rounding": "stochastic", "state_dtype": "fp16", "philox_rounds": 0}, "philox_rounds"),
    ({"rounding": "nearest", "state_dtype": "fp16", "philox_rounds": 10}, "philox_rounds"),
    ({"has_dst": True, "index_dtype": None}, "has_dst"),
    ({"has_dst": True, "update_state": False}, "has_dst"),
    *(({"state_scale_t": "fp32", "state_dtype": state}, "state_scale_t") for state in FLOATS),
    *(({"algorithm": "horizontal", "state_dtype": state}, "algorithm") for state in SCALED),
    *(({"algorithm": name, "ntokens": 2}, "algorithm") for name in ("vertical", "horizontal")),
    ({"algorithm": "vertical", "parents_dtype": "int32"}, "algorithm"),
    ({"accepted_dtype": "int32", "index_dtype": None}, "accepted_dtype"),
    ({"dst_tokens": True, "ntokens": 2}, "dst_tokens"),
    *(
        ({"algorithm": "matrix", "ntokens": 6, **{name: value}}, name)
        for name, value in (
            ("ntokens", 1),
            ("ntokens", 17),
            ("dtype", "fp16"),
            ("state_dtype", "int8"),
            ("dim", 72),
            ("dstate", 96),
            ("dstate", 8),
            ("dstate", 512),
            ("tie_hdim", False),
            ("aligned", False),
            ("pdl", True),
            ("seqlens_dtype", "int32"),
            ("accepted_dtype", "int32"),
            ("parents_dtype", "int64"),
            ("has_intermediate", True),
            ("precision", "exact"),
        )
    ),
    ({"algorithm": "matrix", "ntokens": 6, "state_dtype": "fp16", "dstate": 16}, "dstate"),
    (
        {"algorithm": "matrix", "ntokens": 6, "state_dtype": "fp16", "rounding": "stochastic"},
        "rounding",
    ),
    ({"algorithm": "matrix", "ntokens": 6, "has_dst": True, "dst_tokens": True}, "dst_tokens"),
    ({"dst_tokens": True, "has_dst": True}, "dst_tokens"),
    ({"entry_dtype": "int32", "ntokens": 2}, "entry_dtype"),
]


@pytest.mark.parametrize(("fields", "named"), ILLEGAL)
def test_fields_that_contradict_each_other_are_refused(fields, named):
    with pytest.raises(ConfigError, match=rf"^{named}: .*allowed: "):
        KernelConfig(**fields)


def test_what_follows_from_other_fields_is_filled_in():
    assert KernelConfig(weight_dtype="bf16") == KernelConfig(weight_dtype="bf16", dt_dtype="bf16")
    for state in SCALED:
        assert KernelConfig(state_dtype=state).state_scale_t == "fp32"
    assert KernelConfig(state_dtype="fp16", rounding="stochastic").philox_rounds == 10
    assert KernelConfig().philox_rounds == 0


def test_a_dtype_of_nothing_does_not_make_another_config():
    bare = {"has_d": False, "has_dt_bias": False, "dt_dtype": "fp32"}
    assert KernelConfig(**bare, weight_dtype="bf16") == KernelConfig(**bare, weight_dtype="fp32")


@given(configs())
def test_replacing_nothing_changes_nothing(config):
    assert config.replace() == config


def test_replace_gives_a_checked_copy():
    config = KernelConfig(state_dtype="fp16", dim=80)
    assert config.replace(has_z=True) == KernelConfig(state_dtype="fp16", dim=80, has_z=True)
    with pytest.raises(ConfigError, match="dim"):
        config.replace(dim=81)


@given(configs())
def test_json_round_trip_gives_an_equal_config_and_the_same_text(config):
    text = config.to_json()
    again = KernelConfig.from_json(text)
    assert again == config
    assert hash(again) == hash(config)
    assert again.to_json() == text
    assert again.hash == config.hash
    assert type(again) is type(config)


@given(configs(), st.randoms(use_true_random=False))
def test_json_in_any_order_and_spacing_is_the_same_config(config, random):
    items = list(json.loads(config.to_json()).items())
    random.shuffle(items)
    assert KernelConfig.from_json(json.dumps(dict(items), indent=2)) == config


@given(configs(), configs())
def test_configs_differ_exactly_when_their_json_does(one, other):
    assert (one == other) == (one.to_json() == other.to_json()) == (one.hash == other.hash)


def test_json_may_leave_out_what_is_default():
    assert KernelConfig.from_json('{"dim": 128}') == KernelConfig(dim=128)
    assert json.loads(KernelConfig().to_json())["schema"] == SCHEMA


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", ConfigError, "not JSON"),
        ("{", ConfigError, "not JSON"),
        ("[]", ConfigTypeError, "object"),
        ('{"schema": 2}', ConfigError, "schema: 2"),
        ('{"schema": true}', ConfigError, "schema: True"),
        ("[" * 100_000, ConfigError, "not JSON"),
        (None, ConfigError, "not JSON"),
        ('{"dim": 63}', ConfigError, "dim: 63"),
        ('{"speed": 9}', ConfigTypeError, "speed"),
        ('{"family": 3}', ConfigError, "family: 3"),
    ],
)
def test_json_that_is_no_config_is_refused(text, error, words):
    with pytest.raises(error, match=words):
        KernelConfig.from_json(text)


@given(configs())
def test_a_config_survives_pickle_and_copy(config):
    for again in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), copy.copy(config)):
        assert again == config
        assert type(again) is type(config)


def test_known_config_has_its_known_json_and_hash():
    config = KernelConfig(**KNOWN)
    assert config.to_json() == KNOWN_JSON
    assert config.hash == KNOWN_HASH


def _interpreters():
    found = {sys.executable: {}}
    for minor in range(10, 15):
        name = f"python3.{minor}"
        if path := shutil.which(name):
            # A version manager's shim stands for several; this says which.
            env = {"PYENV_VERSION": f"3.{minor}"}
            run = subprocess.run(
                [path, "-c", "pass"], env={**os.environ, **env}, capture_output=True, check=False
            )
            if run.returncode == 0:
                found[path] = env
    return found


def test_every_process_hash_seed_and_python_gives_the_same_hash():
    code = f"from ssmgen import KernelConfig; print(KernelConfig(**{KNOWN!r}).hash)"
    for path, env in _interpreters().items():
        for seed in ("0", "1", "random"):
            run = subprocess.run(
                [path, "-c", code],
                env={**os.environ, **env, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=True,
            )
            assert run.stdout.strip() == KNOWN_HASH, path


DISPATCH = {"algorithm", "batch_invariant", "precision"}


def test_dispatch_fields_are_no_part_of_the_key():
    config = KernelConfig(state_dtype="fp16")
    plan = dispatch(config, Arch.of("sm_90"))[-1].plan
    keys = set()
    for algorithm in ("auto", plan.algorithm):
        for invariant, precision in ((False, "exact"), (True, "fast")):
            asked = config.replace(
                algorithm=algorithm, batch_invariant=invariant, precision=precision
            )
            assert not DISPATCH & asked.key_fields().keys()
            keys.add(key(asked, plan, Arch.of("sm_90")))
    assert len(keys) == 1


@given(configs(), configs())
def test_every_other_field_is_part_of_the_key(one, other):
    plan, arch = dispatch(KernelConfig(), Arch.of("sm_90"))[-1].plan, Arch.of("sm_90")
    same = one.key_fields() == other.key_fields()
    assert same == (key(one, plan, arch) == key(other, plan, arch))
    assert one.key_fields().keys() == one.fields().keys() - DISPATCH


def test_replace_resolves_derived_fields_anew():
    config = KernelConfig(state_dtype="fp16")
    stochastic = config.replace(rounding="stochastic")
    assert stochastic.philox_rounds == 10
    assert stochastic.replace(rounding="nearest") == config
    int8 = config.replace(state_dtype="int8")
    assert int8.state_scale_t == "fp32"
    assert int8.replace(state_dtype="fp16") == config
    assert config.replace(weight_dtype="bf16").dt_dtype == "bf16"
    assert KernelConfig(state_dtype="fp16", dt_dtype="bf16").replace(dim=80).dt_dtype == "bf16"
