"""How many processors this process may use: affinity and control groups, not what the machine has."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from caption_rt._arguments import whole_number

__all__ = [
    "affinity",
    "default_threads",
    "physical_cores",
    "quota",
    "thread_count",
    "usable_cpus",
    "worker_processors",
]

_ROOT = Path("/")

_MOST_THREADS = 1024


def usable_cpus(root: Path = _ROOT) -> int:
    """How many processors this process may keep busy, at least 1: the least of its affinity and its CPU quota.

    Args:
        root: where ``/proc`` and the control groups lie; another for tests.
    """
    allowed = quota(root)
    cpus = len(affinity()) if allowed is None else min(len(affinity()), int(allowed))
    return max(cpus, 1)


def default_threads(root: Path = _ROOT) -> int:
    """Threads for one operator's work: the usable processors, but one a physical core.

    The two threads of a core share its arithmetic units, which matrix products keep busy by themselves.
    """
    return max(min(usable_cpus(root), len(physical_cores(affinity(), root))), 1)


def thread_count(asked: int | None) -> int:
    """How many threads to ask ONNX Runtime for; 0 leaves it to ONNX Runtime.

    By itself it counts the machine's cores and binds a thread to each, which fails, with a line on standard error, for
    those that the process may not use, and it knows nothing of a container's quota. So it is told; but for systems on
    which only it knows how many of the processors are physical cores (not Linux).

    Args:
        asked: what the user wants; None for `default_threads`.

    Raises:
        OptionsError: no whole number, fewer than 1 thread, or more than 1024.
    """
    if asked is None:
        return default_threads() if sys.platform == "linux" else 0
    # More than any machine's cores is a slip of the finger, and three sessions of so many threads bring it to a stop.
    return whole_number("intra_op_threads", asked, 1, _MOST_THREADS)


def affinity() -> frozenset[int]:
    """The numbers of the processors that this process may run on: taskset, a container's cpuset."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int], root: Path = _ROOT) -> list[tuple[int, ...]]:
    """A set of processors by the physical core they belong to, in order; where only Linux would tell, each is its own.

    Args:
        cpus: numbers of processors.
        root: see `usable_cpus`.
    """
    cores: dict[str, list[int]] = {}
    for cpu in sorted(cpus):
        topology = root / "sys/devices/system/cpu" / f"cpu{cpu}" / "topology"
        # The processors of the same core, as "0,64"; the second name is that of kernels before 5.3.
        siblings = _read(topology / "core_cpus_list") or _read(topology / "thread_siblings_list")
        cores.setdefault(siblings or str(cpu), []).append(cpu)
    return [tuple(core) for core in cores.values()]


def worker_processors(asked: int | None, root: Path = _ROOT) -> list[tuple[int, ...]]:
    """The processors to which each thread of a session is bound, but for the caller's; empty where none is.

    A thread that wakes for an operator may be put on the processor of the one that woke it, and then both wait for each
    other in turns: on two processors a small network took as long as with one thread. Left to itself, ONNX Runtime
    binds a thread to each core of the machine; here it is each core of those that this process may use. Only where
    these are all taken: processes with fewer threads than that would all be bound to the same.

    Args:
        asked: see `thread_count`.
        root: see `usable_cpus`.
    """
    cores = physical_cores(affinity(), root)
    if asked is not None or sys.platform != "linux" or default_threads(root) < len(cores):
        return []
    return cores[1:]


def quota(root: Path = _ROOT) -> float | None:
    """The processors' worth of time that control groups grant this process, such as 1.5; None where there is no limit.

    A group's quota holds for all groups inside it: the tightest on the way up counts. Both versions are read, since a
    machine may have them side by side: ``cpu.max`` of version 2
    (https://docs.kernel.org/admin-guide/cgroup-v2.html), ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` of version 1
    (https://docs.kernel.org/scheduler/sched-bwc.html).
    """
    limits = [limit for folder in _groups(root) if (limit := _limit(folder)) is not None]
    return min(limits, default=None)


def _limit(folder: Path) -> float | None:
    """The quota that one group sets."""
    if (text := _read(folder / "cpu.max")) is not None:
        granted, _, period = text.partition(" ")
    else:
        granted, period = _read(folder / "cpu.cfs_quota_us") or "", _read(folder / "cpu.cfs_period_us") or ""
    # "max" and -1 stand for no limit.
    if not granted.isdecimal() or not period.isdecimal() or int(period) == 0:
        return None
    return int(granted) / int(period)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's groups, of both versions, each with all those above it."""
    mounts = list(_mounts(root))
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        # Number, controllers (none for version 2), path: "4:cpu,cpuacct:/a/b", "0::/a/b".
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not (number == "0" and not controllers) and "cpu" not in controllers.split(","):
            continue
        for version2, top, folder in mounts:
            if version2 == (not controllers):
                yield from _upwards(root / folder.lstrip("/"), _below(path, top))


def _mounts(root: Path) -> Iterator[tuple[bool, str, str]]:
    """Where control groups that could limit the CPU are mounted: version 2 or not, the group on top, the folder."""
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        # proc_pid_mountinfo(5): ID, parent, device, root, mount point, options, ..., "-", type, source, super options.
        fields, _, rest = line.partition(" - ")
        columns, kind = fields.split(" "), rest.split(" ")
        if len(columns) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "cpu" in kind[2].split(",")):
            yield kind[0] == "cgroup2", _unescaped(columns[3]), _unescaped(columns[4])


def _below(path: str, top: str) -> PurePosixPath:
    """A group's path below the one that is mounted, which in a container may be the container's own."""
    group = PurePosixPath(path)
    # A path through ".." is above what can be seen from here.
    if ".." in group.parts or not group.is_relative_to(top):
        return PurePosixPath()
    return group.relative_to(top)


def _upwards(mount: Path, group: PurePosixPath) -> Iterator[Path]:
    yield mount / group
    for parent in group.parents:
        yield mount / parent


def _unescaped(text: str) -> str:
    r"""Spaces, tabs, line breaks and backslashes stand as ``\040`` and the like."""
    for code in ("\\040", "\\011", "\\012", "\\134"):
        text = text.replace(code, chr(int(code[1:], 8)))
    return text


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return None
