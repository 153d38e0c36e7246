"""Threads follow what the process may use; idle ones cost nothing. Control groups are trees of files made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from caption_rt import threads
from caption_rt.bundle import default_bundle_path
from caption_rt.errors import OptionsError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="affinity and control groups are Linux's")


@pytest.fixture
def sixteen(monkeypatch):
    """A process that may run on 16 processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


def machine(root: Path, groups: str, mounts: list[tuple[str, str, str, str]], files: dict[str, str]) -> Path:
    """A machine's files.

    Args:
        root: where they are made.
        groups: /proc/self/cgroup.
        mounts: group on top, mount point, type and super options of each line of /proc/self/mountinfo.
        files: text by path.
    """
    lines = [
        f"{number} 22 0:{number} {top} {point} rw,nosuid - {kind} {kind} {options}"
        for number, (top, point, kind, options) in enumerate(mounts, 30)
    ]
    every = {"proc/self/cgroup": groups, "proc/self/mountinfo": "\n".join(["", *lines, "broken", ""]), **files}
    for name, text in every.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = ("/", "/sys/fs/cgroup", "cgroup2", "rw")
V1 = ("/", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct")
MEMORY = ("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory")


@pytest.mark.parametrize(
    ("limit", "quota", "usable"),
    [
        ("max 100000\n", None, 16),
        ("400000 100000\n", 4.0, 4),
        ("250000 100000\n", 2.5, 2),
        ("50000 100000\n", 0.5, 1),
        ("6400000 100000\n", 64.0, 16),
        ("", None, 16),
        ("100000\n", None, 16),
        ("100000 0\n", None, 16),
    ],
)
def test_the_quota_of_version_2(tmp_path, sixteen, limit, quota, usable):
    root = machine(tmp_path, "0::/app\n", [V2], {"sys/fs/cgroup/app/cpu.max": limit})
    assert threads.quota(root) == quota
    assert threads.usable_cpus(root) == usable


@pytest.mark.parametrize(("granted", "usable"), [("-1", 16), ("300000", 3), ("390000", 3), ("1000", 1)])
def test_the_quota_of_version_1(tmp_path, sixteen, granted, usable):
    group = "sys/fs/cgroup/cpu,cpuacct/docker/abc"
    files = {f"{group}/cpu.cfs_quota_us": f"{granted}\n", f"{group}/cpu.cfs_period_us": "100000\n"}
    groups = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n"
    assert threads.usable_cpus(machine(tmp_path, groups, [MEMORY, V1], files)) == usable


@pytest.mark.parametrize(
    ("limits", "usable"), [(("8", "2", "4"), 2), (("3", "max", "max"), 3), (("max", "max", "5"), 5)]
)
def test_the_tightest_group_on_the_way_up_counts(tmp_path, sixteen, limits, usable):
    folders = "sys/fs/cgroup/a.slice", "sys/fs/cgroup/a.slice/b.scope", "sys/fs/cgroup/a.slice/b.scope/c"
    files = {
        f"{folder}/cpu.max": f"{limit if limit == 'max' else int(limit) * 100000} 100000"
        for folder, limit in zip(folders, limits, strict=True)
    }
    files["sys/fs/cgroup/a.slice/other/cpu.max"] = "100000 100000"
    assert threads.usable_cpus(machine(tmp_path, "0::/a.slice/b.scope/c\n", [V2], files)) == usable


def test_both_versions_side_by_side(tmp_path, sixteen):
    files = {
        "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "700000",
        "sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000",
        "sys/fs/cgroup/unified/y/cpu.max": "900000 100000",
    }
    mounts = [V1, ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw")]
    assert threads.usable_cpus(machine(tmp_path, "4:cpu,cpuacct:/x\n0::/y\n", mounts, files)) == 7


@pytest.mark.parametrize(
    ("group", "top"),
    [
        ("/", "/"),  # a namespace of its own: the container's group is the root
        ("/docker/abc", "/docker/abc"),  # no namespace, and only the container's own group is mounted
        ("/docker/abc/child", "/docker/abc"),  # as before, in a group below it
        ("/../../other", "/"),  # outside what the namespace shows
        ("/docker/abc", "/elsewhere"),
        ("/docker/abc", "/docker/ab"),  # a name that begins alike is another group
    ],
)
def test_a_container_sees_its_own_group_as_the_mount(tmp_path, sixteen, group, top):
    files = {"sys/fs/cgroup/cpu.max": "300000 100000", "sys/fs/cgroup/child/cpu.max": "max 100000"}
    mount = (top, "/sys/fs/cgroup", "cgroup2", "rw")
    assert threads.usable_cpus(machine(tmp_path, f"0::{group}\n", [mount], files)) == 3


def test_names_with_spaces_and_backslashes(tmp_path, sixteen):
    mount = ("/", "/sys/fs/c\\040g\\134x", "cgroup2", "rw")
    files = {"sys/fs/c g\\x/a:b/cpu.max": "500000 100000"}
    assert threads.usable_cpus(machine(tmp_path, "0::/a:b\n", [mount], files)) == 5


def test_a_machine_that_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.quota(tmp_path) is None
    assert threads.usable_cpus(tmp_path) == threads.default_threads(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.usable_cpus(tmp_path) == 1


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
def test_the_network_gets_a_thread_a_physical_core(tmp_path, sixteen, monkeypatch, name):
    for cpu in range(16):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        topology.mkdir(parents=True)
        (topology / name).write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    assert threads.usable_cpus(tmp_path) == 16
    assert threads.default_threads(tmp_path) == 8
    monkeypatch.setattr(sys, "platform", "linux")
    assert threads.worker_processors(None, tmp_path) == [(cpu, cpu + 8) for cpu in range(1, 8)]
    # Fewer threads than cores might be those of one process of many, which would all take the same cores.
    assert threads.worker_processors(8, tmp_path) == []
    # Both processors of one core, and one of another.
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1, 9, 3})
    assert threads.default_threads(tmp_path) == 2
    assert threads.worker_processors(None, tmp_path) == [(3,)]
    machine(tmp_path, "0::/\n", [V2], {"sys/fs/cgroup/cpu.max": "100000 100000"})
    assert threads.default_threads(tmp_path) == 1
    assert threads.worker_processors(None, tmp_path) == []


def test_threads_that_are_asked_for(monkeypatch):
    assert threads.thread_count(5) == 5
    for nonsense in 0, -1, 1025:
        with pytest.raises(OptionsError, match=f"must be a whole number from 1 to 1024, not {nonsense}"):
            threads.thread_count(nonsense)
    monkeypatch.setattr(threads, "default_threads", lambda: 3)
    monkeypatch.setattr(sys, "platform", "linux")
    assert threads.thread_count(None) == 3
    # Only ONNX Runtime knows the physical cores of these.
    monkeypatch.setattr(sys, "platform", "darwin")
    assert threads.thread_count(None) == 0


def run(script, *arguments):
    """What a real process of this Python prints, as JSON."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stderr == ""
    return json.loads(done.stdout)


# ONNX Runtime's threads, but not those of NumPy's BLAS, which are there before.
ENGINE = """
import json, os, sys, time
if sys.argv[2] != "all":
    os.sched_setaffinity(0, {int(sys.argv[2])})
import numpy as np
from caption_rt import threads
from caption_rt.bundle import Bundle
from caption_rt.engine import Engine

def caption(engine):
    images = np.zeros((2, size, size, 3), np.uint8)
    encoded = engine.encode(engine.extract(images))
    state = encoded.initial_state
    for _ in range(5):
        state = engine.decode(np.zeros(2, np.int64), state, encoded.features, encoded.keys).next_state

bundle = Bundle.open(sys.argv[1])
size = bundle.manifest.image.size
"""

COUNT = """
before = len(os.listdir("/proc/self/task"))
asked = json.loads(sys.argv[3])
engine = Engine(bundle, "cpu", asked)
caption(engine)
after = len(os.listdir("/proc/self/task"))
json.dump([threads.usable_cpus(), engine.intra_op_threads, after - before], sys.stdout)
"""


@LINUX
def test_a_process_on_one_processor_gets_one_thread(tiny_bundle):
    """And no line on standard error, as ONNX Runtime writes when it binds threads to processors that it may not use."""
    cpu = max(os.sched_getaffinity(0))
    assert run(ENGINE + COUNT, tiny_bundle, cpu, "null") == [1, 1, 0]


@LINUX
@pytest.mark.parametrize("asked", [1, 3])
def test_the_threads_asked_for_are_those_that_run(tiny_bundle, asked):
    """Each of the three sessions has them, the calling thread being one of each."""
    usable, threads_used, started = run(ENGINE + COUNT, tiny_bundle, "all", asked)
    assert usable == threads.usable_cpus()
    assert (threads_used, started) == (asked, 3 * (asked - 1))


PROCESSORS = """
before = set(os.listdir("/proc/self/task"))
engine = Engine(bundle, "cpu", json.loads(sys.argv[3]))
caption(engine)
started = [int(task) for task in os.listdir("/proc/self/task") if task not in before]
# A thread binds itself, once it has begun.
deadline = time.monotonic() + 10
while True:
    found = sorted(sorted(os.sched_getaffinity(task)) for task in started)
    if found == json.loads(sys.argv[4]) or time.monotonic() > deadline:
        break
    time.sleep(0.01)
json.dump(found, sys.stdout)
"""


@LINUX
def test_threads_are_bound_where_they_take_every_core_of_the_process(tiny_bundle):
    """Those of all three sessions to the same; the calling thread goes where it likes, as before."""
    bound = sorted(3 * [list(core) for core in threads.worker_processors(None)])
    assert run(ENGINE + PROCESSORS, tiny_bundle, "all", "null", bound) == bound
    free = [sorted(os.sched_getaffinity(0))] * 3
    assert run(ENGINE + PROCESSORS, tiny_bundle, "all", 2, free) == free


IDLE = """
engines = [Engine(bundle, "cpu", 4) for _ in range(int(sys.argv[3]))]
for _ in range(5):
    for engine in engines:
        caption(engine)
start = time.process_time()
time.sleep(0.5)
json.dump(time.process_time() - start, sys.stdout)
"""


@pytest.mark.parametrize("engines", [1, 2])
def test_idle_engines_take_no_processor_time(engines):
    """Left to itself, ONNX Runtime keeps a processor busy for a tenth of a second after each run."""
    assert run(ENGINE + IDLE, default_bundle_path(), "all", engines) < 0.02
