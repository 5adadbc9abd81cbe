"""Which entries and keys the arguments of a command name."""

from __future__ import annotations

from collections.abc import Iterable

import typer

from ..arch import Arch, gpu_name
from ..config import KernelConfig
from ..errors import SsmgenError
from ..plan import Choice, dispatch, variants
from ..store import evict, stores
from ..template import key as key_of
from .entries import Entry, fail, only
from .inputs import is_key, read_arch, read_config

__all__ = ["chosen", "entries_of", "keys_of", "read_target"]


def chosen(
    found: Iterable[Entry],
    archs: list[str] | None,
    families: list[str] | None,
    toolchains: list[str] | None = None,
) -> list[Entry]:
    """Those of the named architectures, families and toolchains; None is any."""
    wanted = {str(read_arch(name)) for name in archs or ()}
    return [
        entry
        for entry in found
        if (not wanted or entry.arch in wanted)
        and (not families or entry.family in families)
        and (not toolchains or entry.toolchain in toolchains)
    ]


def keys_of(text: str, arch: str | None, here: Iterable[str], where: str) -> list[str]:
    """The keys that an argument names: one, or those of a config that are among `here`."""
    if is_key(text):
        return [only(text, here, where)]
    known = set(here)
    config, target, _ = read_target(text, arch)
    plans = variants(config, target)
    keys = [key for plan in plans if (key := key_of(config, plan, target)) in known]
    if not keys:
        fail(f"no kernel of this config is in {where}")
    return keys


def read_target(text: str, arch: str | None) -> tuple[KernelConfig, Arch, tuple[Choice, ...]]:
    """A config, its architecture, and the plans that serve it there; if none is named, here."""
    try:
        config = read_config(text)
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None
    target = read_arch(arch)
    try:
        gpu = gpu_name(None) if arch is None else None
        return config, target, dispatch(config, target, gpu)
    except SsmgenError as error:
        raise typer.BadParameter(str(error)) from None


def entries_of(text: str, arch: str | None) -> list[Entry]:
    """Every entry, in every trusted store, of the keys that an argument names."""
    layers = stores()
    here = [key for store in layers for key, _ in store.names()]
    keys = keys_of(text, arch, here, "the stores")
    found = []
    for store in layers:
        used = {(u.key, u.toolchain): u for u in evict.usage(store)}
        found += [
            Entry.at(store, key, name, used.get((key, name)))
            for key in keys
            for name in store.toolchains(key)
        ]
    return found
