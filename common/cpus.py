"""How many threads this process may compute with.  No torch here.

    threads()  # the least of the CPUs it is bound to, the CPU time of its cgroups, and OMP_NUM_THREADS
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def threads() -> int:
    """The threads that can run at a time, and no more than OMP_NUM_THREADS where that is a number."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list has one number for each level
    limits = [bound_cpus(), cgroup_cpus(), int(wanted) if wanted.isdecimal() and int(wanted) else math.inf]
    return max(1, math.ceil(min(limits)))


def bound_cpus() -> int:
    """The CPUs that the scheduler may use for this process: a launcher, taskset or a container may have bound it."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def cgroup_cpus(proc: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float:
    """The CPU seconds that the process's cgroups may use in a second; infinity where nothing limits them."""
    try:
        lines = proc.read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    return min((limit for line in lines for limit in limits_of(line, mounted)), default=math.inf)


def limits_of(line: str, mounted: Path) -> Iterator[float]:
    """The limits of the group that a line `number:controllers:path` names, and of those that it lies in.

    In a container the path may be that of the host, of which the container sees the last part or nothing: folders that
    are not there are skipped.
    """
    _, controllers, path = line.split(":", 2)
    if controllers and "cpu" not in controllers.split(","):
        return
    root = mounted / controllers
    for group in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
        if not group.is_relative_to(root):
            return
        try:
            if controllers:
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8")
                                 for name in ("quota", "period"))
            else:
                quota, period = (group / "cpu.max").read_text(encoding="utf-8").split()
            limit = int(quota) / int(period)
        except (OSError, ValueError):  # "max": no limit
            continue
        if limit > 0:  # -1: no limit
            yield limit
