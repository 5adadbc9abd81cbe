"""What all tests share: an environment of their own, and the options of the suite."""

from __future__ import annotations

import os

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "ssmgen",
    hypothesis.settings.get_profile("ci" if os.environ.get("CI") else "default"),
    deadline=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.function_scoped_fixture,
    ],
)
hypothesis.settings.load_profile("ssmgen")


def pytest_addoption(parser):
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden anew from the templates"
    )


@pytest.fixture(autouse=True, scope="session")
def _own_environment(tmp_path_factory):
    """No test sees the user's store or switches; the workers of xdist share the cores."""
    import torch

    from ssmgen.settings import VARIABLES

    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("SSMGEN_CACHE_DIR", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture
def store_dir(tmp_path, monkeypatch):
    """An empty user store."""
    root = tmp_path / "store"
    monkeypatch.setenv("SSMGEN_CACHE_DIR", str(root))
    return root
