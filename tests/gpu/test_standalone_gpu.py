"""What `ssmgen render --standalone` writes, on a GPU, through Triton's own launcher."""

from __future__ import annotations

import pytest
from standalone_files import FEATURES, GLUON, run_alone

from ssmgen import Arch, KernelConfig
from ssmgen.plan import dispatch
from ssmgen.standalone import standalone

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("name", "interpret"),
    [*((name, interpret) for name in FEATURES for interpret in (False, True)),
     *((name, False) for name in GLUON)],
)  # fmt: skip
def test_the_file_runs_alone_on_a_gpu_and_finds_itself_right(name, interpret, tmp_path):
    fields = GLUON.get(name) or {"pdl": True, **FEATURES[name]}
    config, arch = KernelConfig(**fields), Arch.detect()
    for i, plan in enumerate({choice.plan for choice in dispatch(config, arch)}):
        folder = tmp_path / str(i)
        folder.mkdir()
        source = standalone(config, plan, arch, interpret=interpret)
        result = run_alone(source, folder)
        assert result.returncode == 0, result.stdout + result.stderr
