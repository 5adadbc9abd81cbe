"""Real processes for the tests of the store: forked ones, users without rights, small disks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOBODY = 65534


def fork(work):
    """Start `work()` in a child; it exits with 0 if that is true, 2 if not, 1 if it raises."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = 0 if work() else 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def join(child):
    """Its exit code; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def forked(work):
    """The exit code of a child that does `work`."""
    return join(fork(work))


def race(works):
    """All of `works` at once, each in its own process; their exit codes."""
    ready, start = os.pipe()

    def wait_then(work):
        os.close(start)
        os.read(ready, 1)
        return work()

    children = [fork(lambda work=work: wait_then(work)) for work in works]
    os.close(ready)
    os.close(start)
    return [join(child) for child in children]


def as_nobody(work):
    """`forked`, as a user who owns no file."""

    def lowered():
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return work()

    return forked(lowered)


def killed_at_every_step(work, steps):
    """Run `work` again and again in children, each killed one step later; yields after each.

    `steps(step)` patches whatever is to count as a step to call ``step()`` first.
    """
    number = 0
    while True:
        number += 1
        left = [number]

        def step(left=left):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def run(step=step):
            steps(step)
            work()
            return True

        code = forked(run)
        assert code in (0, -signal.SIGKILL), f"step {number}: exit code {code}"
        yield number
        if code == 0:
            return


def python(code, *arguments, wrap=(), **env):
    """Run `code` in a fresh interpreter that can import ssmgen and the helpers of the tests."""
    run = subprocess.run(
        [*wrap, sys.executable, "-B", "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout


def can_mount():
    """Whether a name space with mounts of its own is to be had."""
    with contextlib.suppress(OSError):
        probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
        return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return False


def mounted(commands):
    """The prefix that runs a command where `commands` (of a shell) have mounted something."""
    return ("unshare", "-rm", "sh", "-c", f'{commands} && exec "$@"', "sh")
