"""Arch: names, abilities, and what a machine has."""

from __future__ import annotations

import pytest

from ssmgen import Arch, arch
from ssmgen.arch import KNOWN
from ssmgen.errors import ConfigError, DeviceError


@pytest.mark.parametrize("name", KNOWN)
def test_every_spelling_names_the_same_arch(name):
    cc = int(name.removeprefix("sm_"))
    dotted = f"{cc // 10}.{cc % 10}"
    spellings = (name, f"{name}a", cc, str(cc), dotted, float(dotted), Arch(cc))
    assert {Arch.of(spelling) for spelling in spellings} == {Arch(cc)}
    assert str(Arch.of(name)) == name


@pytest.mark.parametrize("value", ["sm_75", "sm_95", "90 or so", "", None, 9, 1.5])
def test_an_unknown_arch_is_refused_with_the_known_ones(value):
    with pytest.raises(ConfigError, match=r"arch: .*allowed: sm_80, .*sm_121"):
        Arch.of(value)


def test_an_arch_cannot_be_made_of_an_unknown_number():
    with pytest.raises(ConfigError, match="arch: 75 is not known"):
        Arch(75)


def test_what_each_arch_can_do():
    able = {
        what: {name for name in KNOWN if getattr(Arch.of(name), what)}
        for what in ("pdl", "cvt_rs", "fp8")
    }
    assert able == {
        "pdl": {"sm_90", "sm_100", "sm_103", "sm_120", "sm_121"},
        "cvt_rs": {"sm_100", "sm_103"},
        "fp8": set(KNOWN) - {"sm_80", "sm_86"},
    }


def test_shared_memory_is_what_cuda_documents_for_a_block():
    # CUDA C++ Programming Guide, technical specifications per compute capability.
    kib = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
    assert {Arch.of(n).cc: Arch.of(n).shared_memory for n in KNOWN} == {
        cc: 1024 * size for cc, size in kib.items()
    }


@pytest.mark.parametrize(
    ("capability", "found"),
    [((8, 0), 80), ((8, 6), 86), ((8, 7), 80), ((9, 0), 90), ((10, 3), 103), ((12, 1), 121)],
)
def test_a_device_is_its_own_architecture_and_an_unknown_8_x_is_sm_80(
    monkeypatch, capability, found
):
    monkeypatch.setattr(arch, "_capability", lambda device: capability)
    assert Arch.detect() == Arch(found)


@pytest.mark.parametrize("capability", [(7, 5), (9, 5), (10, 1), (11, 0), (13, 0)])
def test_a_device_of_an_unknown_generation_is_an_error(monkeypatch, capability):
    monkeypatch.setattr(arch, "_capability", lambda device: capability)
    with pytest.raises(DeviceError, match=r"compute capability .* not supported"):
        Arch.detect()


def test_without_a_device_the_error_says_to_name_an_arch(monkeypatch):
    monkeypatch.setattr(arch, "_capability", lambda device: None)
    with pytest.raises(DeviceError, match="arch='sm_90'"):
        Arch.detect()
