"""Layers: what manifests say of a kind of layers, and which configs serve it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from ..errors import ConfigError

__all__ = ["Layers", "share"]


class Layers(ABC):
    """A kind of recurrent layers. A model has the kind whose `facts` it has most of.

    facts: names of the numbers that must be said of it, besides ``layers`` and ``conv_width``.
    counts: the name of the one that may be: how many of the layers are of this kind.
    """

    facts: tuple[str, ...]
    counts: str

    @abstractmethod
    def rank(self, facts: Mapping[str, int], size: int) -> dict[str, int]:
        """What one of `size` tensor-parallel ranks has of what is dealt out. Raises `ConfigError`
        if there is no even cut."""

    @abstractmethod
    def needs(self, facts: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
        """What a rank with these facts must find: a config with the fields of each, family
        included."""


def share(facts: Mapping[str, int], name: str, size: int) -> int:
    """An even share of what is dealt out to `size` ranks. Raises `ConfigError` if there is none."""
    if facts[name] % size:
        raise ConfigError(f"{size} ranks do not divide {facts[name]} {name}")
    return facts[name] // size
