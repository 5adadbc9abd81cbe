r"""What bounds the slowest cells: launches for Nsight Compute to look at.

    ncu --profile-from-start off --clock-control none --section SpeedOfLight \
        --section Occupancy --section LaunchStats --section InstructionStats \
        --section SchedulerStats --section WarpStateStats --section MemoryWorkloadAnalysis \
        --csv --page details python benchmarks/limits.py > ncu.csv
    python benchmarks/limits.py --read ncu.csv benchmarks/results/limits-h200.json

The first command profiles one launch of each cell of `CELLS`, on slots that are not in the L2; the
second keeps what `KEPT` names of it.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

CELLS: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "fp8 + SR 10, 128 heads, batch 256": ("fp8_e4m3fn + SR 10", 128, 256, {}),
    "int8 + SR 10, 128 heads, batch 256": ("int8 + SR 10", 128, 256, {}),
    "int8, 128 heads, batch 256": ("int8", 128, 256, {}),
    "fp32, 128 heads, batch 1": ("fp32", 128, 1, {}),
    "bf16, 6 tokens, each written, 128 heads, batch 64": (
        "bf16", 128, 64,
        {"ntokens": 6, "has_intermediate": True, "update_state": False, "entry_dtype": "int64"},
    ),
}  # fmt: skip
# Of ncu's details page: what stands in the result file.
KEPT = (
    "Duration",
    "DRAM Throughput",
    "L2 Cache Throughput",
    "Compute (SM) Throughput",
    "Issued Warp Per Scheduler",
    "Eligible Warps Per Scheduler",
    "Active Warps Per Scheduler",
    "Warp Cycles Per Issued Instruction",
    "Executed Instructions",
    "Achieved Occupancy",
    "Theoretical Occupancy",
    "Registers Per Thread",
    "Mem Busy",
    "Max Bandwidth",
    "Memory Throughput",
)


def launch() -> None:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("limits: no GPU here")

    from ssmgen.bench.grid import config_of
    from ssmgen.bench.problem import make

    for label, heads, batch, fields in CELLS.values():
        problem = make(config_of(label, **fields), batch, heads)
        for which in range(problem.sets):
            problem.launch(which)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        problem.launch(0)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del problem


def read(source: Path, target: Path) -> None:
    """Write what `KEPT` names of the profile `source`, by cell, to `target`."""
    _, found, body = source.read_text().partition('"ID"')
    if not found:
        raise SystemExit(f"{source}: not the details page of ncu as CSV")
    lines = f"{found}{body}".splitlines()
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        kept = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        if row["Metric Name"] in KEPT:
            kept[row["Metric Name"]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    if len(CELLS) != len(launches):
        raise SystemExit(f"{source}: {len(launches)} launches found, {len(CELLS)} expected")
    target.write_text(json.dumps(dict(zip(CELLS, launches.values())), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--read", nargs=2, type=Path, metavar=("PROFILE", "RESULT"))
    given = parser.parse_args()
    if given.read:
        read(*given.read)
    else:
        launch()


if __name__ == "__main__":
    main()
