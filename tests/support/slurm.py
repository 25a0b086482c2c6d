"""A Slurm cluster on this machine: its real daemons, with a configuration and state of their own in a folder.

All nodes are this machine.  It takes root and the packages that scripts/install_slurm.sh installs.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.ranks import environment, free_port

CPUS = 2  # of a node, by its own account
SECONDS = 100  # in which the cluster starts, and a job changes its state, also on a busy machine
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel", "scontrol", "squeue")
SEARCHED = f"{os.environ['PATH']}:/usr/sbin:/sbin"
CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=100000,bf_interval=1
KillWait=5
PartitionName=all Nodes=ALL Default=YES
"""
NODE = "NodeName=127.0.0.{number} NodeHostname={host} NodeAddr=127.0.0.{number} Port={port} CPUs={cpus}\n"


def problem() -> str | None:
    """Why there can be no cluster here, or None."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]
    if missing:
        return f"no {', '.join(missing)} here (apt-get install slurm-wlm munge)"
    return "Slurm's daemons want root" if os.geteuid() != 0 else None


class Cluster:
    """`count` nodes, node1, node2, …; `folder` keeps configuration, state and logs."""

    def __init__(self, count: int, folder: Path):
        self.folder = folder
        self.nodes = [f"127.0.0.{number}" for number in range(1, count + 1)]
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def configure(self) -> None:
        host = os.uname().nodename
        nodes = [NODE.format(number=number, host=host, port=free_port(), cpus=CPUS)
                 for number in range(1, len(self.nodes) + 1)]
        config = CONFIG.format(host=host, port=free_port(), folder=self.folder)
        (self.folder / "slurm.conf").write_text(config + "".join(nodes))
        for name in ("state", "munge"):
            (self.folder / name).mkdir()
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o400)

    def daemons(self) -> list[list[str]]:
        files = [f"--{option}={self.folder}/munge/{name}" for option, name in (
            ("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        return [["munged", "--foreground", "--force", *files], ["slurmctld", "-D", "-i"],
                *(["slurmd", "-D", "-N", node] for node in self.nodes)]

    def call(self, *command) -> str:
        """What one of Slurm's commands prints.  Jobs get the environment of the tests."""
        variables = environment(PYTHON=sys.executable, **self.environment)
        for name in ("MASTER_ADDR", "MASTER_PORT"):  # these are to come from Slurm
            variables.pop(name)
        done = subprocess.run(list(map(str, command)), env=variables, text=True,
                              capture_output=True, timeout=SECONDS)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def wait_until(self, reached, what: str, output: Path | None = None) -> None:
        """Until reached() is true.  `output` (default: the log of slurmctld) is shown where that takes too long."""
        give_up = time.monotonic() + SECONDS
        while not reached():
            shown = output if output and output.exists() else self.folder / "slurmctld.log"
            assert time.monotonic() < give_up, f"{what}: {shown.read_text()[-3000:]}"
            time.sleep(0.2)

    def is_up(self) -> bool:
        shown = subprocess.run(["sinfo", "--noheader", "--states=idle", "--format=%D"], text=True, capture_output=True,
                               env=os.environ | self.environment)
        return shown.stdout.strip() == str(len(self.nodes))

    def states(self, job: str) -> list[str]:
        """PENDING, RUNNING, COMPLETED, …, of each task of a job array."""
        return re.findall(r"JobState=(\w+)", self.call("scontrol", "show", "job", job))


@contextmanager
def running(count: int, folder: Path):
    """A cluster while the block runs.  Its jobs are cancelled at the end."""
    cluster = Cluster(count, folder)
    cluster.configure()
    with ExitStack() as stack:
        for command in cluster.daemons():
            log = stack.enter_context(open(folder / f"{command[0]}_{command[-1].rpartition('/')[2]}.txt", "w"))
            daemon = subprocess.Popen([shutil.which(command[0], path=SEARCHED), *command[1:]], stdout=log, stderr=log,
                                      stdin=subprocess.DEVNULL, env=os.environ | cluster.environment, cwd=folder)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
        cluster.wait_until(cluster.is_up, "the nodes did not come up")
        try:
            yield cluster
        finally:
            cluster.call("scancel", "--user=root")
            cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), "jobs are left")
