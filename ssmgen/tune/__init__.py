"""Tune: which plan is fastest on the GPU at hand, measured, and written down as dispatch tables."""

from __future__ import annotations

from .tuner import Progress, Report, tune

__all__ = ["Progress", "Report", "tune"]
