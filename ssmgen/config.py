"""KernelConfig: which kernel is wanted.

A config is frozen, validated when it is built, and has one canonical JSON form; two configs that
ask for the same binary have the same form in every process and on every machine. Each family
subclasses it with the fields it needs; ``KernelConfig(family="ssu", ...)`` builds the right one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any, ClassVar

from .errors import ConfigError, ConfigTypeError

__all__ = [
    "ALGORITHMS",
    "SCHEMA",
    "KernelConfig",
    "canonical_json",
    "choice",
    "dtype_name",
    "flag",
    "integer",
    "once",
    "plain",
    "shown",
]

SCHEMA = 1

ALGORITHMS = ("simple", "vertical", "horizontal", "matrix")

_DTYPES = {
    "fp64": ("float64", "double"),
    "fp32": ("float32", "float"),
    "bf16": ("bfloat16",),
    "fp16": ("float16", "half"),
    "fp8_e4m3fn": ("float8_e4m3fn",),
    "int64": ("long",),
    "int32": ("int",),
    "int16": ("short",),
    "int8": (),
}
_ALIASES = {alias: name for name, all_ in _DTYPES.items() for alias in (name, *all_)}


def dtype_name(value: Any) -> str:
    """The short name (``bf16``) of a torch dtype or of any of its names; ConfigError if none."""
    name = _dtype(value)
    if name is None:
        raise ConfigError(f"{shown(value)} is not a dtype; known: {', '.join(_DTYPES)}")
    return name


def _dtype(value: Any) -> str | None:
    torch = sys.modules.get("torch")
    text = str(value) if torch and type(value) is torch.dtype else plain(value)
    return _ALIASES.get(text.removeprefix("torch.")) if type(text) is str else None


def plain(value: Any) -> Any:
    """The built-in str or int that a value of a subclass holds, whatever it prints as or compares
    equal to; any other value as it is. What is rendered has gone through here."""
    kind = type(value)
    if issubclass(kind, str):
        return str.__str__(value)
    if issubclass(kind, int) and kind is not bool:
        return int.__index__(value)
    return value


def shown(value: Any) -> str:
    """A value as an error message shows it: short, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # of a class that is not ours, or an int too long to print
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."


def canonical_json(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON in which no name stands twice: the second would silently win."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in one object")
        found[name] = value
    return found


def choice(default: Any, allowed: Iterable[Any], **metadata: Any) -> Any:
    """A field whose value is one of `allowed`; dtype names are normalised first."""
    return dataclasses.field(default=default, metadata={"allowed": tuple(allowed), **metadata})


def flag(default: bool, **metadata: Any) -> Any:
    """A boolean field."""
    return dataclasses.field(default=default, metadata={"kind": bool, **metadata})


def integer(default: int | None, low: int, high: int, step: int = 1, **metadata: Any) -> Any:
    """An integer field in ``low..high``, a multiple of `step`."""
    return dataclasses.field(
        default=default, metadata={"kind": int, "range": (low, high, step), **metadata}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """What all families share. Raises `ConfigError` or `ConfigTypeError` naming field, value
    and what is allowed.

    Fields marked *dispatch* say how a kernel is chosen, not what it is; they are no part of
    `key_fields`, so ``algorithm="auto"`` and the algorithm it resolves to share one binary.
    """

    _families: ClassVar[dict[str, type[KernelConfig]]] = {}
    # Fields that `check` resolves from the others when they are left out.
    derived: ClassVar[tuple[str, ...]] = ()

    family: str = "ssu"
    dtype: str = choice("bf16", ("bf16", "fp16", "fp32"))
    algorithm: str = choice("auto", ("auto", *ALGORITHMS), dispatch=True)
    index_dtype: str | None = choice("int64", ("int32", "int64", None))
    aligned: bool = flag(True)
    pdl: bool = flag(False)
    batch_invariant: bool = flag(False, dispatch=True)

    def __new__(cls, /, **fields: Any) -> KernelConfig:
        if cls is KernelConfig:
            cls = _subclass(fields.get("family", "ssu"))
        known = [field.name for field in dataclasses.fields(cls)]
        for name in map(plain, fields):
            if name not in known:
                raise ConfigTypeError(
                    f"{name}: not a field of this config; fields: {', '.join(known)}"
                )
        return object.__new__(cls)

    def __init_subclass__(cls, family: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KernelConfig._families[family] = cls

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        return (), {"family": self.family}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        self.check()

    def check(self) -> None:
        """Resolve derived defaults and reject impossible combinations; families override it."""

    def resolve(self, name: str, value: Any) -> None:
        """Set a field that was left to its default; for use in `check` only."""
        object.__setattr__(self, name, value)

    @staticmethod
    def reject(name: str, value: Any, allowed: str) -> None:
        """Raise the `ConfigError` all fields share."""
        raise ConfigError(f"{name}: {shown(value)} is not allowed; allowed: {allowed}")

    def replace(self, **changes: Any) -> KernelConfig:
        """A copy with some fields changed, validated again.

        A field that holds what `check` would resolve it to is resolved anew.
        """
        given = {n: v for n, v in self.fields().items() if n not in self.derived}
        resolved = type(self)(**given)
        given |= {n: getattr(self, n) for n in self.derived
                  if getattr(self, n) != getattr(resolved, n)}  # fmt: skip
        return type(self)(**{**given, **changes})

    def fields(self) -> dict[str, Any]:
        """Every field by name."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def key_fields(self) -> dict[str, Any]:
        """The fields that decide the binary: all but the dispatch ones."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if not f.metadata.get("dispatch")
        }

    def to_json(self) -> str:
        """Canonical JSON with the schema version; `from_json` reads it back."""
        return canonical_json({"schema": SCHEMA, **self.fields()})

    @classmethod
    def from_json(cls, text: str | bytes) -> KernelConfig:
        """Build a config from `to_json`'s output. Missing fields take their defaults."""
        try:
            fields = json.loads(text, object_pairs_hook=once)
        except (TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"config: not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ConfigTypeError("config: a JSON object is needed")
        schema = fields.pop("schema", SCHEMA)
        if isinstance(schema, bool) or schema != SCHEMA:
            cls.reject("schema", schema, str(SCHEMA))
        return KernelConfig(**fields)

    @property
    def hash(self) -> str:
        """sha256 of `to_json`, as hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _subclass(family: Any) -> type[KernelConfig]:
    from .families import names, spec

    name = plain(family)
    if type(name) is not str or name not in names():
        raise ConfigError(f"family: {shown(name)} is not known; allowed: {', '.join(names())}")
    spec(name)
    return KernelConfig._families[name]


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    meta = field.metadata
    value = plain(value)
    if "allowed" in meta:
        value = _dtype(value) or value
        for allowed in meta["allowed"]:
            if type(value) is type(allowed) and value == allowed:
                return allowed
        KernelConfig.reject(field.name, value, ", ".join(map(str, meta["allowed"])))
    elif meta.get("kind") is bool:
        if type(value) is not bool:
            raise ConfigTypeError(
                f"{field.name}: {shown(value)} is not a bool; allowed: True, False"
            )
    elif meta.get("kind") is int and not (value is None and field.default is None):
        low, high, step = meta["range"]
        allowed = f"{low} to {high}" + (f" in multiples of {step}" if step > 1 else "")
        if type(value) is not int:
            raise ConfigTypeError(f"{field.name}: {shown(value)} is not an int; allowed: {allowed}")
        if not low <= value <= high or value % step:
            KernelConfig.reject(field.name, value, allowed)
    return value
