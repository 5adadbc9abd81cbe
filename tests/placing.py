"""Placed plans of a call: who holds what is said by the source."""

from __future__ import annotations

import dataclasses
from typing import Any

from ssmgen import Arch, Plan
from ssmgen.families import spec
from ssmgen.plan import dispatch

__all__ = ["placed"]


def placed(config: Any, arch: str = "sm_90") -> list[Plan]:
    """The distinct simple plans of a config's dispatch, placed; none where none can be."""
    family, where = spec(config.family), Arch.of(arch)
    simple = (c.plan for c in dispatch(config, where) if c.plan.algorithm == "simple")
    plans = (family.fit(config, dataclasses.replace(p, placed=True), where) for p in simple)
    return [plan for plan in dict.fromkeys(plans) if plan.placed]
