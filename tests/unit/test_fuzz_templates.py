"""No value that a caller gives reaches template text unless it is one that a legal config has.

What is hostile here carries MARK wherever it could print it: a source that holds the word, or that
differs from the source of the same fields read back from JSON, has let something through.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from ssu_configs import configs

from ssmgen import Arch, KernelConfig, Plan
from ssmgen.errors import ConfigError, ConfigTypeError
from ssmgen.families import names
from ssmgen.families.ssu import SsuConfig
from ssmgen.plan import dispatch
from ssmgen.template import render

SM_90 = Arch.of("sm_90")
PLAN = Plan(algorithm="simple", block_m=16, block_n=128, num_warps=2)
CONFIG_FIELDS = {f.name: f.default for f in dataclasses.fields(SsuConfig)}
PLAN_FIELDS = PLAN.fields()

MARK = "intruder"
INJECTIONS = [
    MARK,
    f"fp16\nimport {MARK}",
    f'simple"""\n{MARK}()\n"""',
    f"{{{{ {MARK} }}}}",
    f"{{% include '{MARK}' %}}",
    f"../{MARK}",
    f"simple\0{MARK}",
    f"fp16 {MARK}",
    f"ｆｐ１６{MARK}",
    "parts",
    "",
]


class Odd:
    """Compares equal to anything and prints as an injection, whatever it is."""

    def __str__(self) -> str:
        return INJECTIONS[1]

    __repr__ = __str__

    def __format__(self, spec: str) -> str:
        return INJECTIONS[1]

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    def __hash__(self) -> int:
        return 0


class OddStr(Odd, str):
    def __hash__(self) -> int:
        return str.__hash__(self)

    def removeprefix(self, prefix: str) -> str:
        return self


class OddInt(Odd, int):
    def __hash__(self) -> int:
        return int.__hash__(self)

    def __lt__(self, other: object) -> bool:
        return True

    __le__ = __gt__ = __ge__ = __lt__

    def __and__(self, other: object) -> int:
        return 0

    __mod__ = __and__


class Fickle(int):
    """A number that counts and compares as it should, and prints as itself once at most."""

    def __str__(self) -> str:
        return INJECTIONS[1]

    def __format__(self, spec: str) -> str:
        said, self.said = getattr(self, "said", False), True
        return INJECTIONS[1] if said else int.__repr__(self)


class Silent(Odd):
    """Cannot even be printed."""

    def __repr__(self) -> str:
        raise RuntimeError(MARK)

    __str__ = __repr__


class Disguised(Odd):
    """Says it is a string."""

    @property
    def __class__(self) -> type:  # type: ignore[override]
        return str


def printed_as(text: str) -> Any:
    """An object that is no string and prints as a legal one, the first time."""
    said = iter([text])

    class Fickle(Odd):
        def __str__(self) -> str:
            return next(said, INJECTIONS[1])

    return Fickle()


def hostile(legal: Any) -> st.SearchStrategy[Any]:
    """Values that are not `legal`, or only seem to be."""
    plain = st.one_of(
        st.sampled_from(INJECTIONS),
        st.text(max_size=30),
        st.integers(),
        st.floats(),
        st.booleans(),
        st.binary(max_size=5),
    )
    odd = [
        lambda: 10**5000,
        Odd,
        Silent,
        Disguised,
        lambda: OddStr(MARK),
        lambda: OddInt(3),
        lambda: [Odd()],
    ]
    if isinstance(legal, str):
        odd += [lambda: OddStr(legal), lambda: OddStr(MARK + legal), lambda: printed_as(legal)]
    elif isinstance(legal, int):
        odd += [lambda: OddInt(legal), lambda: OddInt(-legal), lambda: float(legal)]
        odd += [lambda: str(legal), lambda: OddInt(10**5000)]
    nested = st.recursive(
        plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner)
    )
    return nested | st.sampled_from(odd).map(lambda make: make())


def assert_nothing_else(config: KernelConfig, plan: Plan) -> None:
    """`config` and `plan` render what the same fields do when JSON has carried them."""
    for value in (*config.fields().values(), *plan.fields().values()):
        assert type(value) in (str, int, bool, type(None))
    carried = KernelConfig.from_json(json.dumps(config.fields()))
    source = render(config, plan, SM_90)
    assert source == render(carried, Plan(**json.loads(json.dumps(plan.fields()))), SM_90)
    assert MARK not in source


@st.composite
def one_hostile_field(draw: Any, fields: dict[str, Any]) -> tuple[str, Any]:
    name = draw(st.sampled_from(sorted(fields)))
    return name, draw(hostile(fields[name]))


@given(one_hostile_field(CONFIG_FIELDS))
def test_a_config_takes_no_hostile_value(field):
    give_config(*field)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("algorithm", lambda: OddStr("simple")),
        ("family", lambda: OddStr("ssu")),
        ("dtype", lambda: OddStr("bf16")),
        ("dtype", lambda: printed_as("bf16")),
        ("dim", lambda: OddInt(64)),
        ("dim", lambda: Fickle(64)),
        ("dim", lambda: 10**5000),
        ("has_z", lambda: OddInt(1)),
        ("state_dtype", Odd),
        ("index_dtype", Silent),
        ("rounding", Disguised),
    ],
)
def test_a_config_takes_none_of_these(name, make):
    give_config(name, make())


def give_config(name: str, value: Any) -> None:
    for build in (KernelConfig, SsuConfig):
        try:
            config = build(**{name: value})
        except (ConfigError, ConfigTypeError):
            continue
        assert_nothing_else(config, dispatch(config, SM_90)[-1].plan)


@given(one_hostile_field(PLAN_FIELDS))
def test_a_plan_takes_no_hostile_value(field):
    give_plan(*field)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("algorithm", lambda: OddStr("simple")),
        ("algorithm", lambda: "parts"),
        ("algorithm", lambda: ["simple"]),
        ("block_m", lambda: OddInt(16)),
        ("block_m", lambda: Fickle(16)),
        ("num_warps", lambda: OddInt(3)),
        ("split", lambda: 10**5000),
        ("evict_first", lambda: INJECTIONS[1]),
        ("evict_first", lambda: 1),
        ("early", lambda: 0),
        ("placed", lambda: "yes"),
    ],
)
def test_a_plan_takes_none_of_these(name, make):
    give_plan(name, make())


def give_plan(name: str, value: Any) -> None:
    try:
        plan = Plan(**{**PLAN_FIELDS, name: value})
    except ConfigError:
        return
    assert_nothing_else(KernelConfig(), plan)


@pytest.mark.parametrize(
    ("build", "make"),
    [
        (Arch.of, lambda: OddStr("90")),
        (Arch.of, lambda: OddInt(90)),
        (Arch.of, lambda: Fickle(90)),
        (Arch.of, lambda: f"90\n{MARK}"),
        (Arch.of, Odd),
        (Arch, lambda: OddInt(90)),
        (Arch, Odd),
        (Arch, lambda: "90"),
        (Arch, lambda: Fickle(90)),
        (Arch, lambda: 10**5000),
        (Arch.of, lambda: 10**5000),
        (Arch.of, Silent),
    ],
)
def test_an_arch_takes_none_of_these(build, make):
    try:
        arch = build(make())
    except ConfigError:
        return
    assert type(arch.cc) is int
    assert MARK not in render(KernelConfig(), PLAN, arch)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(INJECTIONS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
)  # fmt: skip
KEYS = st.sampled_from(
    [*CONFIG_FIELDS, "schema", "derived", "_families", "cls", "self", "fields", "__class__", MARK]
)


@given(fields=st.dictionaries(KEYS, JSON, max_size=3))
@example(fields={"cls": 1})
@example(fields={"derived": []})
@example(fields={"family": []})
def test_json_gives_a_legal_config_or_a_config_error(fields):
    try:
        config = KernelConfig.from_json(json.dumps(fields))
    except (ConfigError, ConfigTypeError):
        return
    assert_nothing_else(config, dispatch(config, SM_90)[-1].plan)


@given(st.text() | st.binary() | JSON.map(json.dumps) | st.just('{"dim": ' + "9" * 5000 + "}"))
@example("[" * 100_000)
@example(b"\xff\xfe{")
def test_text_that_is_no_config_is_a_config_error(text):
    try:
        config = KernelConfig.from_json(text)
    except (ConfigError, ConfigTypeError):
        return
    assert_nothing_else(config, dispatch(config, SM_90)[-1].plan)


@given(config=configs())
def test_a_legal_config_of_odd_strings_and_ints_is_the_plain_one(config):
    # Not refused, so that a member of an enum serves as well; but nothing of the class is kept.
    odd = {
        name: OddStr(v) if isinstance(v, str) else OddInt(v) if type(v) is int else v
        for name, v in config.fields().items()
    }
    assert KernelConfig(**odd).to_json() == config.to_json()
    assert_nothing_else(KernelConfig(**odd), dispatch(config, SM_90)[-1].plan)


@pytest.mark.parametrize("family", names())
def test_every_field_of_every_family_is_validated(family):
    config = KernelConfig(family=family)
    for field in dataclasses.fields(config):
        assert field.metadata.keys() & {"allowed", "kind"}, field.name
        for value in (MARK, 2**80, -1.5, [], Odd()):
            with pytest.raises((ConfigError, ConfigTypeError)):
                config.replace(**{field.name: value})
