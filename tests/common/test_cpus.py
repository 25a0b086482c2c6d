"""How many threads a process takes: what it is bound to, what its cgroups allow, and OMP_NUM_THREADS."""

import math
import os
import subprocess
import sys

import pytest

from common import cpus
from tests.support.ranks import ROOT


@pytest.mark.parametrize("variable, expected", [("1", 1), ("3,4", 3), ("0", 64), ("", 64), ("many", 64), ("100", 64)])
def test_omp_num_threads_is_a_limit_where_it_is_a_number(monkeypatch, variable, expected):
    monkeypatch.setattr(cpus, "bound_cpus", lambda: 64)
    monkeypatch.setattr(cpus, "cgroup_cpus", lambda: math.inf)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert cpus.threads() == expected


def write_group(folder, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def limit(folder, *lines: str) -> float:
    (folder / "self").write_text("\n".join(lines) + "\n")
    return cpus.cgroup_cpus(folder / "self", folder)


def test_the_least_quota_of_all_groups_of_version_2_counts(tmp_path):
    write_group(tmp_path / "jobs" / "one", cpu__max="max 100000")
    assert limit(tmp_path, "0::/jobs/one") == math.inf
    write_group(tmp_path / "jobs", cpu__max="250000 100000")
    assert limit(tmp_path, "0::/jobs/one") == 2.5
    write_group(tmp_path / "jobs" / "one", cpu__max="150000 100000")
    assert limit(tmp_path, "0::/jobs/one") == 1.5


def test_in_a_container_the_group_is_the_root_of_what_it_sees(tmp_path):
    write_group(tmp_path, cpu__max="150000 50000")
    assert limit(tmp_path, "0::/docker/0123") == 3.0


@pytest.mark.parametrize("controllers", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_version_1_counts(tmp_path, controllers):
    write_group(tmp_path / controllers, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    lines = ["4:memory:/jobs", f"2:{controllers}:/jobs/one", "0::/"]
    assert limit(tmp_path, *lines) == math.inf
    write_group(tmp_path / controllers / "jobs", cpu__cfs_quota_us="50000", cpu__cfs_period_us="100000")
    assert limit(tmp_path, *lines) == 0.5


def test_without_cgroups_nothing_is_limited(tmp_path):
    assert cpus.cgroup_cpus(tmp_path / "none", tmp_path) == math.inf


THREADS = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from devices.device import select_device
from devices.options import DeviceOptions
import torch
torch.set_num_threads(4)
select_device(DeviceOptions(no_cuda=True))
print(torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes cannot be bound to CPUs here")
def test_a_process_that_is_bound_to_one_cpu_computes_in_one_thread():
    env = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.stdout.split() == ["1"], done.stderr
