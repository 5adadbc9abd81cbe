"""Dispatch tables of a test's own."""

from __future__ import annotations

import json
from pathlib import Path

from ssmgen import tables

GPU = "NVIDIA Pretend 9000"


def put(root, rows, *, key="fp16.nearest", arch="sm_90", gpu=GPU, family="ssu", **more) -> Path:
    """Write a table under `root` where dispatch looks for it; `more` overrides its fields."""
    path = Path(root) / family / arch / tables.slug(gpu) / f"{key}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": tables.SCHEMA, "family": family, "key": key, "gpu": gpu, "arch": arch,
               "measured": {}, "rows": rows, **more}  # fmt: skip
    path.write_text(json.dumps(content))
    return path
