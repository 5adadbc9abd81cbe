"""What the benchmarks share: warm clocks, the environment, result files."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import torch


def warm_clocks(seconds: float = 0.5) -> None:
    """Work until the clocks are up."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    while True:
        for _ in range(50):
            a @ a
        end.record()
        end.synchronize()
        if start.elapsed_time(end) > seconds * 1000:
            return


def environment() -> dict[str, Any]:
    """What the numbers were measured with."""
    import triton

    import ssmgen

    return {
        "date": datetime.date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "ssmgen": ssmgen.__version__,
    }


def _driver() -> str:
    import subprocess

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0].strip()


def result(name: str, content: dict[str, Any]) -> Path:
    """The result file of a benchmark on the GPU that `content` was measured on."""
    gpu = content["environment"]["gpu"].removeprefix("NVIDIA ").replace(" ", "-").lower()
    return Path(__file__).parent / "results" / f"{name}-{gpu}.json"


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write a result file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path.name}")
