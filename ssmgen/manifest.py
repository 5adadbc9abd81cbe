"""Manifest: which kernels to compile ahead of time, as JSON that people write.

A list in the place of a field's value stands for each of its members, and several lists for their
product. What a manifest says about models is checked against the configs it holds, so that one
which names a model cannot forget it.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import families, resources
from .config import KernelConfig, once
from .errors import ConfigError, ConfigTypeError
from .families.layers import Layers

__all__ = ["SCHEMA", "Manifest", "Model", "find", "read", "shipped"]

SCHEMA = 1

_FIELDS = ("schema", "source", "models", "tensor_parallel", "common", "configs")
_MODEL = ("name", "repositories", "facts")
_FACTS = ("layers", "conv_width")


@dataclass(frozen=True)
class Model:
    """A model that a manifest serves, and the facts of its recurrent layers: ``conv_width``, and
    what their family wants to know (`families.layers`). ``layers`` are all that the model has.
    """

    name: str
    repositories: tuple[str, ...]
    facts: dict[str, int]

    def rank(self, size: int) -> dict[str, int]:
        """What one of `size` tensor-parallel ranks has. Raises `ConfigError` if there is no even
        cut."""
        try:
            return _kind(self.facts).rank(self.facts, size)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None

    def needs(self, size: int) -> tuple[dict[str, Any], ...]:
        """Fields of the configs that one of `size` ranks must find, a config for each of them."""
        return _kind(self.facts).needs({**self.facts, **self.rank(size)})


def _kind(facts: Iterable[str]) -> Layers:
    """The kind of layers that has most of these facts."""
    kinds = [kind for name in families.names() for kind in families.spec(name).layers]
    return max(kinds, key=lambda kind: len(set(facts) & set(kind.facts)))


@dataclass(frozen=True)
class Manifest:
    """``configs`` are distinct and in the order written."""

    origin: str
    source: str
    models: tuple[Model, ...]
    tensor_parallel: tuple[int, ...]
    configs: tuple[KernelConfig, ...]


def read(path: str | Path) -> Manifest:
    """Read and expand a manifest. Raises `ConfigError` or `ConfigTypeError` naming file, entry,
    field, value and what is allowed."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: {why}") from None
    return parse(text, str(path))


def parse(text: str, origin: str) -> Manifest:
    """Expand a manifest; `origin` names it in errors."""
    try:
        data = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not JSON: {error}") from None
    _fields(data, origin, _FIELDS, required=("schema", "configs"))
    if data["schema"] is True or data["schema"] != SCHEMA:
        raise ConfigError(f"{origin}: schema: {data['schema']!r} is not known; allowed: {SCHEMA}")
    source = data.get("source", "")
    _require(source, str, f"{origin}: source", "a string")
    models = tuple(
        _model(entry, f"{origin}: models[{i}]")
        for i, entry in enumerate(_list(data.get("models", []), f"{origin}: models"))
    )
    sizes = data.get("tensor_parallel", [1])
    sizes = tuple(
        _positive(size, f"{origin}: tensor_parallel[{i}]")
        for i, size in enumerate(_list(sizes, f"{origin}: tensor_parallel"))
    )
    if not sizes:
        raise ConfigError(f"{origin}: tensor_parallel: [] is empty; allowed: a size or several")
    names = [model.name for model in models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{origin}: models: {name!r} stands there {names.count(name)} times")
    common = data.get("common", {})
    _require(common, dict, f"{origin}: common", "an object")
    configs: dict[KernelConfig, None] = {}
    for i, entry in enumerate(_list(data["configs"], f"{origin}: configs")):
        where = f"{origin}: configs[{i}]"
        _require(entry, dict, where, "an object")
        configs.update(dict.fromkeys(_expand({**common, **entry}, where)))
    if not configs:
        raise ConfigError(f"{origin}: configs: empty; allowed: at least one object")
    manifest = Manifest(origin, source, models, sizes, tuple(configs))
    _check_models(manifest)
    return manifest


def _expand(entry: dict[str, Any], where: str) -> Iterable[KernelConfig]:
    """The configs of one entry: the product of its lists. ``note`` is for people."""
    _require(entry.get("note", ""), str, f"{where}: note", "a string")
    fields = {name: value for name, value in entry.items() if name != "note"}
    lists = [name for name, value in fields.items() if isinstance(value, list)]
    for name in lists:
        if not fields[name]:
            raise ConfigError(f"{where}: {name}: [] is empty; allowed: a value or several")
    for values in itertools.product(*(fields[name] for name in lists)):
        chosen = dict(zip(lists, values))
        try:
            yield KernelConfig(**{**fields, **chosen})
        except (ConfigError, ConfigTypeError) as error:
            text = f"{where}: {error}"
            if chosen:
                said = ", ".join(f"{name}={value!r}" for name, value in chosen.items())
                text += f" (in the combination {said}; what cannot be combined needs entries of "
                text += "its own)"
            raise type(error)(text) from None


def _check_models(manifest: Manifest) -> None:
    """Every rank of every model must find its shapes among the configs."""
    there = [config.fields() for config in manifest.configs]
    for model in manifest.models:
        for size in manifest.tensor_parallel:
            try:
                needs = model.needs(size)
            except ConfigError as error:
                raise ConfigError(f"{manifest.origin}: {error}") from None
            for wanted in needs:
                if not any(wanted.items() <= fields.items() for fields in there):
                    said = ", ".join(f"{name}={value}" for name, value in wanted.items())
                    raise ConfigError(
                        f"{manifest.origin}: {model.name} over {size} "
                        f"{'ranks' if size > 1 else 'rank'} needs {said}; no config has these"
                    )


def _model(entry: Any, where: str) -> Model:
    _fields(entry, where, _MODEL, required=_MODEL)
    _require(entry["name"], str, f"{where}: name", "a string")
    repositories = _list(entry["repositories"], f"{where}: repositories")
    for i, repository in enumerate(repositories):
        _require(repository, str, f"{where}: repositories[{i}]", "a string")
    facts = entry["facts"]
    _require(facts, dict, f"{where}: facts", "an object")
    kind = _kind(facts)
    required = (*_FACTS, *kind.facts)
    _fields(facts, f"{where}: facts", (*required, kind.counts), required)
    for name, value in facts.items():
        _positive(value, f"{where}: facts: {name}")
    if facts.get(kind.counts, 0) > facts["layers"]:
        raise ConfigError(
            f"{where}: facts: {kind.counts}: {facts[kind.counts]} of {facts['layers']} layers"
        )
    return Model(entry["name"], tuple(repositories), facts)


def _fields(value: Any, where: str, allowed: tuple[str, ...], required: tuple[str, ...]) -> None:
    _require(value, dict, where, "an object")
    for name in value:
        if name not in allowed:
            raise ConfigError(f"{where}: {name}: not a field; allowed: {', '.join(allowed)}")
    for name in required:
        if name not in value:
            raise ConfigError(f"{where}: {name}: missing; required: {', '.join(required)}")


def _require(value: Any, kind: type, where: str, allowed: str) -> None:
    if not isinstance(value, kind):
        raise ConfigTypeError(f"{where}: {value!r} is not allowed; allowed: {allowed}")


def _list(value: Any, where: str) -> list[Any]:
    _require(value, list, where, "a list")
    return value


def _positive(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{where}: {value!r} is not allowed; allowed: a positive integer")
    return value


@functools.cache
def shipped() -> tuple[Manifest, ...]:
    """The manifests that come with ssmgen, by file name."""
    folder = resources.root() / "cache" / "manifests"
    return tuple(read(path) for path in sorted(folder.glob("*.json")))


def find(name: str) -> Manifest:
    """The shipped manifest of a model, by its name or the name of its repository."""
    known: dict[str, Manifest] = {}
    names: list[str] = []
    for manifest in shipped():
        for model in manifest.models:
            names.append(model.name)
            for alias in (model.name, *model.repositories):
                known[alias.lower()] = manifest
                known[alias.rpartition("/")[2].lower()] = manifest
    found = known.get(name.lower())
    if found is None:
        close = difflib.get_close_matches(name.lower(), known, n=3)
        hint = f"; close: {', '.join(close)}" if close else ""
        raise ConfigError(f"model: {name!r} has no manifest{hint}; known: {', '.join(names)}")
    return found
