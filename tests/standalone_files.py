"""Files that run without ssmgen, and how they are run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ssmgen import Arch, KernelConfig
from ssmgen.plan import dispatch
from ssmgen.standalone import standalone

SMALL = {"dim": 16, "dstate": 16}

# Every field of ssu at least once in each of its kinds.
FEATURES = {
    "plain": {"state_dtype": "fp32", "has_z": True, **SMALL},
    "bf16-dst": {"state_dtype": "bf16", "has_dst": True, "index_dtype": "int32", "dim": 24,
                 "dstate": 40},
    "fp16-stochastic": {"state_dtype": "fp16", "rounding": "stochastic", "philox_rounds": 5,
                        "algorithm": "vertical", **SMALL},
    "int16-mamba1": {"state_dtype": "int16", "tie_hdim": False, "has_d": False, **SMALL},
    "int8-stochastic-unaligned": {"state_dtype": "int8", "rounding": "stochastic",
                                  "aligned": False, "tie_hdim": False, "dtype": "fp32", **SMALL},
    "fp8-bare": {"state_dtype": "fp8_e4m3fn", "has_dt_bias": False, "dt_softplus": False,
                 "weight_dtype": "bf16", "a_dtype": "fp16", **SMALL},
    "read-only-unindexed": {"state_dtype": "fp16", "index_dtype": None, "update_state": False,
                            "algorithm": "horizontal", "dtype": "fp16", **SMALL},
    "tokens": {"state_dtype": "bf16", "ntokens": 3, "has_z": True, "has_dst": True,
               "algorithm": "simple", **SMALL},
    "tokens-mamba1-int8": {"state_dtype": "int8", "ntokens": 2, "tie_hdim": False,
                           "aligned": False, "algorithm": "simple", **SMALL},
}  # fmt: skip

# In Gluon, so on a GPU alone.
GLUON = {
    "matrix": {"state_dtype": "fp16", "ntokens": 6, "has_z": True},
    "matrix-fp32": {"state_dtype": "fp32", "ntokens": 11, "algorithm": "matrix"},
}


def made(config: KernelConfig, arch: str = "sm_90", *, interpret: bool) -> str:
    target = Arch.of(arch)
    return standalone(config, dispatch(config, target)[-1].plan, target, interpret=interpret)


def run_alone(source: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a file where nothing of this checkout can be imported."""
    (folder / "kernel.py").write_text(source)
    (folder / "ssmgen.py").write_text("raise ImportError('ssmgen is not here')\n")
    return subprocess.run(
        [sys.executable, "kernel.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
