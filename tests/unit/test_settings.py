"""The SSMGEN_* variables."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from ssmgen import settings as module
from ssmgen.errors import ConfigError
from ssmgen.settings import VARIABLES, settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "_memo", None)


def test_every_variable_has_a_sentence_on_what_it_does():
    assert all(name.startswith("SSMGEN_") for name in VARIABLES)
    assert all(len(text) > 20 and text.endswith(".") for text in VARIABLES.values())


def test_an_unknown_variable_is_warned_of(monkeypatch, caplog):
    monkeypatch.setenv("SSMGEN_CACHE_DIRECTORY", "/somewhere")
    with caplog.at_level(logging.WARNING, "ssmgen"):
        settings()
    assert "SSMGEN_CACHE_DIRECTORY" in caplog.text


def test_known_variables_are_not_warned_of(monkeypatch, caplog):
    for name in VARIABLES:
        monkeypatch.setenv(name, "deny" if name == "SSMGEN_JIT" else "1")
    with caplog.at_level(logging.WARNING, "ssmgen"):
        settings()
    assert not caplog.records


@pytest.mark.parametrize("field", ["interpret", "batch_invariant"])
@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("ON", True), (" yes ", True), ("0", False), ("off", False),
     ("", False), ("False", False), (None, False)],
)  # fmt: skip
def test_a_switch_is_read_in_every_common_spelling(monkeypatch, field, text, value):
    if text is not None:
        monkeypatch.setenv(f"SSMGEN_{field.upper()}", text)
    assert getattr(settings(), field) is value


@pytest.mark.parametrize("name", ["SSMGEN_INTERPRET", "SSMGEN_BATCH_INVARIANT"])
def test_a_switch_that_is_neither_on_nor_off_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(ConfigError, match=f"{name}: 'maybe'.*allowed: 0, 1"):
        settings()


def test_the_user_store_is_the_named_one_then_xdg_then_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert settings().cache_dir == Path("/home/someone/.cache/ssmgen")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert settings().cache_dir == Path("/xdg/ssmgen")
    monkeypatch.setenv("SSMGEN_CACHE_DIR", "~/kernels")
    assert settings().cache_dir == Path("/home/someone/kernels")


@pytest.mark.parametrize("name", ["SSMGEN_CACHE_DIR", "SSMGEN_CACHE_PATH"])
def test_a_home_of_nobody_is_refused(monkeypatch, name):
    monkeypatch.setenv(name, "~nobody-of-this-name/kernels")
    with pytest.raises(ConfigError, match=f"{name}: '~nobody-of-this-name/kernels'"):
        settings()


def test_without_a_home_there_is_no_user_store(monkeypatch):
    def nowhere():
        raise RuntimeError("no home")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    assert settings().cache_dir is None


def test_cache_path_is_split_like_path(monkeypatch):
    assert settings().cache_path == ()
    monkeypatch.setenv("SSMGEN_CACHE_PATH", os.pathsep.join(["/a", "", "/b"]))
    assert settings().cache_path == (Path("/a"), Path("/b"))


def test_settings_are_read_when_needed_and_again_when_a_variable_changes(monkeypatch):
    before = settings()
    assert settings() is before
    monkeypatch.setenv("SSMGEN_INTERPRET", "1")
    assert settings().interpret
    monkeypatch.setenv("SSMGEN_INTERPRET", "0")
    assert not settings().interpret
