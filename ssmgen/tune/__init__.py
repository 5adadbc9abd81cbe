"""Tune: which plan is fastest on the GPU at hand, measured, and written down as dispatch tables."""

from __future__ import annotations

from .tuner import SIZES, Progress, Report, tune

__all__ = ["SIZES", "Progress", "Report", "tune"]
