"""What a launch hands to the driver, seen by a driver that notes it."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from ssmgen import launcher
from ssmgen.errors import DeviceError
from ssmgen.launcher import Launch

FAILED = SimpleNamespace(name="CUDA_ERROR_INVALID_HANDLE")
# Nothing says that an address is less than 2^63.
ADDRESSES = (0x7F00_0000_0010, 2**64 - 16, 0)
SCALARS = (-1, 3)


@pytest.fixture
def launches(monkeypatch):
    """The parameters of each launch, as integers of 8 bytes, with its grid, block and stream."""
    done = SimpleNamespace(seen=[], result=0)

    def start(handle, x, y, z, threads, ty, tz, shared, stream, params, extra):
        table = ctypes.cast(params, ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)))
        values = [table[i].contents.value for i in range(len(ADDRESSES) + len(SCALARS) + 1)]
        done.seen.append(((x, y, z), threads, stream, values))
        return (done.result,)

    monkeypatch.setattr(launcher, "_driver", lambda: SimpleNamespace(cuLaunchKernel=start))
    return done


def made(grid=(4, 2, 1)):
    arguments = ["*fp32"] * len(ADDRESSES) + ["i64"] * len(SCALARS)
    function = SimpleNamespace(handle=9, threads=128, shared=0, arguments=arguments, scratch=1)
    return Launch(function, grid, SCALARS, pdl=False)


def test_a_launch_has_the_addresses_of_its_call_and_the_integers_of_its_layout(launches):
    launch = made()
    launch(7, *ADDRESSES)
    launch.fill(16, 32, 48)
    launch.start(8)
    signed = [ctypes.c_int64(a).value for a in ADDRESSES]
    assert launches.seen == [
        ((4, 2, 1), 128, 7, [*signed, *SCALARS, 0]),
        ((4, 2, 1), 128, 8, [16, 32, 48, *SCALARS, 0]),
    ]


def test_an_empty_grid_is_not_launched(launches):
    made(grid=(0, 2, 1))(7, *ADDRESSES)
    assert not launches.seen


def test_what_the_driver_says_is_in_the_error(launches):
    launches.result = FAILED
    with pytest.raises(DeviceError, match="launch: CUDA_ERROR_INVALID_HANDLE"):
        made()(7, *ADDRESSES)
