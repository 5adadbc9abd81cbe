"""Placed plans of a call: who holds what is said by the source."""

from __future__ import annotations

import dataclasses
from typing import Any

from ssmgen import Arch, Plan
from ssmgen.families import spec
from ssmgen.plan import dispatch

__all__ = ["placed"]


def placed(config: Any, arch: str = "sm_90") -> list[Plan]:
    """The distinct plans of a config's dispatch, if it must be simple, placed; none where none can
    be."""
    family, where = spec(config.family), Arch.of(arch)
    choices = dispatch(config.replace(algorithm="simple"), where)
    plans = (family.fit(config, dataclasses.replace(c.plan, placed=True), where) for c in choices)
    return [plan for plan in dict.fromkeys(plans) if plan.placed]
