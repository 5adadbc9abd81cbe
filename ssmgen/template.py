"""Config + plan -> source: a small readable Triton or Gluon module with no dead branches.

Jinja is imported only when something is rendered; the key of a kernel needs the templates' bytes,
not Jinja.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import textwrap
from typing import Any, NamedTuple

from . import resources
from .arch import Arch
from .config import SCHEMA, KernelConfig, canonical_json
from .families import spec
from .plan import Plan

__all__ = [
    "ABI_VERSION",
    "TRITON_TYPES",
    "digest",
    "entry_name",
    "factors",
    "key",
    "options",
    "render",
]

# How a launcher must pass the arguments of a cubin: see `artifact.Artifact`.
ABI_VERSION = 1

TRITON_TYPES = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "fp8_e4m3fn": "u8",  # not every architecture has the type; templates reinterpret the byte
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
}

_TL = {
    "fp32": "tl.float32",
    "bf16": "tl.bfloat16",
    "fp16": "tl.float16",
    "int16": "tl.int16",
    "int8": "tl.int8",
}


def entry_name(config: KernelConfig, plan: Plan) -> str:
    """Name of the kernel function."""
    return f"{config.family}_{plan.algorithm}"


@functools.cache
def digest(family: str) -> str:
    """sha256 over every template a kernel of `family` can be made from."""
    base = resources.root() / "templates"
    total = hashlib.sha256()
    for folder in ("common", family):
        # Plain calls: paths would cost a first `get_kernel` a tenth of its time.
        where = str(base / folder)
        for name in sorted(name for name in os.listdir(where) if name.endswith(".j2")):
            total.update(f"{folder}/{name}\0".encode())
            with open(f"{where}/{name}", "rb") as file:
                total.update(hashlib.sha256(file.read()).digest())
    return total.hexdigest()


class _Asked(NamedTuple):
    config: dict[str, Any]
    arguments: tuple[tuple[str, str, int], ...]


@functools.lru_cache(maxsize=256)
def _asked(config: KernelConfig) -> _Asked:
    """The factors that are the same for every plan and architecture."""
    arguments = spec(config.family).arguments(config)
    return _Asked(config.key_fields(), tuple((a.name, a.type, a.align) for a in arguments))


def factors(config: KernelConfig, plan: Plan, arch: Arch) -> dict[str, Any]:
    """All that decides a kernel but the toolchain."""
    family, asked = spec(config.family), _asked(config)
    return {
        "schema": SCHEMA,
        "abi": ABI_VERSION,
        "arch": str(arch),
        "config": dict(asked.config),
        "arguments": [list(argument) for argument in asked.arguments],
        "plan": plan.fields(),
        "templates": digest(config.family),
        "context": dict(family.context(config, plan, arch)),
        "options": options(config, plan, arch),
    }


def options(config: KernelConfig, plan: Plan, arch: Arch) -> dict[str, Any]:
    """What the compiler is told besides the source; nothing is left to the environment."""
    return {
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        "maxnreg": plan.maxnreg,
        "launch_pdl": bool(config.pdl and arch.pdl),
        "enable_fp_fusion": spec(config.family).fuses,
        "ptx_options": "",
    }


def key(config: KernelConfig, plan: Plan, arch: Arch) -> str:
    """sha256 of the canonical JSON of `factors`."""
    return hashlib.sha256(canonical_json(factors(config, plan, arch)).encode()).hexdigest()


def render(config: KernelConfig, plan: Plan, arch: Arch, *, interpret: bool = False) -> str:
    """The source of one kernel. With `interpret` it has no inline assembly."""
    family = spec(config.family)
    context = dict(family.context(config, plan, arch))
    fields = " ".join(f"{k}={v}" for k, v in config.key_fields().items())
    text = (
        _environment()
        .get_template(f"{config.family}/kernel.py.j2")
        .render(
            config=config,
            plan=plan,
            arch=arch,
            key=key(config, plan, arch),
            config_lines=textwrap.wrap(fields, 88),
            entry=entry_name(config, plan),
            arguments=family.arguments(config),
            interpret=interpret,
            tl_dtype=_TL.__getitem__,
            **context,
        )
    )
    # One blank line inside a function, two before the next: what a formatter would leave.
    text = re.sub(r"\n{2,}", "\n\n", text)
    text = re.sub(r"\n\n@(triton|gluon)", r"\n\n\n@\1", text)
    return text.rstrip("\n") + "\n"


@functools.cache
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(resources.root() / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )
