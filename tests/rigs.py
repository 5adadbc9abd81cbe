"""A GPU that there is not: costs from a function, noise and drift from a generator, a clock that
only its own measurements move."""

from __future__ import annotations

import contextlib
import math
import random

from ssmgen import Arch, template


class FakeRig:
    """`cost(config, plan, heads)` is the truth, in microseconds. A timing takes `launches` launches
    and is off by `noise` (relative, normal) and by a drift that all share. To load the kernels of a
    config takes `load` seconds, and those of the first one `begin` more. After `stop` timings comes
    Ctrl-C."""

    gpu = "NVIDIA Pretend 9000"
    multiprocessors = 132

    def __init__(self, cost, *, noise=0.01, drift=0.05, launches=100, stop=math.inf, seed=0,
                 load=0.0, begin=0.0, arch="sm_90", wrong=None, blind=()):  # fmt: skip
        self.arch = Arch.of(arch)
        self.identity = {"gpu": self.gpu, "driver": "1.0"}
        self.cost, self.noise, self.drift, self.launches = cost, noise, drift, launches
        self.load, self.begin = load, begin
        self.stop, self.wrong, self.blind = stop, wrong or {}, blind
        self.random = random.Random(seed)
        self.now = 100.0
        self.timings = 0
        self.opened = []

    def clock(self):
        return self.now

    def measures(self, family):
        return family not in self.blind

    @contextlib.contextmanager
    def open(self, config, batch, nheads, plans):
        self.opened.append((config, batch, nheads, tuple(plans)))
        loaded = any(config == other for other, *_ in self.opened[:-1])
        self.now += 0.02 + (not loaded) * self.load + (len(self.opened) == 1) * self.begin
        yield _FakeBench(self, config, batch * nheads, {p: self.wrong[p] for p in plans
                                                        if p in self.wrong})  # fmt: skip


class _FakeBench:
    def __init__(self, rig, config, heads, wrong):
        self.rig, self.config, self.heads, self.wrong = rig, config, heads, wrong

    def round(self, plans):
        rig = self.rig
        found = []
        for plan in plans:
            assert plan not in self.wrong
            rig.timings += 1
            if rig.timings > rig.stop:
                raise KeyboardInterrupt
            drift = 1 + rig.drift * math.sin(rig.now)
            true = rig.cost(self.config, plan, self.heads)
            micro = true * drift * math.exp(rig.random.gauss(0, rig.noise))
            rig.now += micro * rig.launches / 1e6
            found.append(micro)
        return found


class FakeCompiler:
    """Compiles nothing: `resources(job)` is what differs from the manifest of a small kernel."""

    def __init__(self, resources=lambda job: {}):
        self.resources = resources
        self.jobs = []

    def __call__(self, jobs, note):
        self.jobs += jobs
        usual = {"registers": 64, "spills": 0, "shared": 256}
        found = {}
        for i, job in enumerate(jobs):
            assert job.key == template.key(job.config, job.plan, job.arch)
            found[job.key] = {"key": job.key, **usual, **self.resources(job)}
            note(i + 1, len(jobs))
        return found
