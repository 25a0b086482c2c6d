"""A disk that fills up while checkpoints and log are written, and has room again later."""

import errno
import resource
import signal
import subprocess
from pathlib import Path

import pytest

from checkpoint.folder import newest_readable, saved_steps
from common.errors import UserError
from tests.support import ranks, samples, small_run
from tests.support.small_run import files_of_at_most, flags, train
from training.log import PersistentFile

SIZE = 50  # MB; a checkpoint of the small run has 9


class SmallFileSystem:
    """A file system of 50 MB of its own; a file of no use takes the room."""

    holds_log = True

    def __init__(self, folder: Path):
        self.waste = folder / "of_no_use"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}m", "tmpfs", folder], capture_output=True,
                              text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def fill(self, job) -> None:
        with open(self.waste, "ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def make_room(self, job) -> None:
        self.waste.unlink()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.waste.parent], check=True)


class SmallFiles:
    """Where nothing can be mounted: no file of the process can grow to more than a megabyte, for a time."""

    holds_log = False  # its lines and what the process prints must find room

    def __init__(self, folder: Path):
        folder.mkdir()

    def fill(self, job) -> None:
        resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))

    def make_room(self, job) -> None:
        resource.prlimit(job.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def close(self) -> None:
        """The limit was the process's, and went with it."""


@pytest.fixture(params=[SmallFileSystem, SmallFiles])
def disk(request, tmp_path):
    disk = request.param(tmp_path / "small")
    yield disk
    disk.close()


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_run.write_workspace(tmp_path)


@pytest.mark.slow
def test_a_full_disk_stops_no_training_and_loses_no_checkpoint_and_no_line_of_the_log(workspace, disk):
    """Checkpoints and log on the same disk.  It is full for some checkpoints, and has room again for the last one."""
    output, log = workspace / "small", workspace / "small/log.json"
    changes = {"output_dir": output, "json_summary": log, "max_steps": 100_000, "num_steps_per_checkpoint": 10}
    with ranks.started([*ranks.TRAIN, *flags(**changes)], workspace) as job:
        job.wait_for("ckpt_20.pt")
        disk.fill(job)
        job.wait_for("could not be written")
        disk.fill(job)  # what was written of that checkpoint is gone, and made room
        kept = saved_steps(output)
        assert kept
        if disk.holds_log:
            job.wait_for("its lines are kept for later")
        job.wait_for(f"step {kept[-1] + 20} ")
        assert saved_steps(output) == kept
        disk.make_room(job)
        job.wait_for(f"ckpt_{kept[-1] + 50}.pt")
        job.process.send_signal(signal.SIGTERM)
        done = job.finish(seconds=60)
    assert done.returncode == 0, done.stdout
    assert "those before it are kept, and the training continues" in done.stdout
    assert not disk.holds_log or "written to again, no line is missing" in done.stdout
    logged = list(samples.losses(log))
    assert logged == list(range(1, len(logged) + 1))
    assert newest_readable(output, print)[0] == logged[-1]
    warnings = [line["data"]["warning"] for line in samples.log_lines(log) if "warning" in line["data"]]
    assert warnings and "could not be written" in warnings[0]


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_that_names_the_newest(workspace):
    train(steps_this_run=4)
    with files_of_at_most(1 << 20), pytest.raises(UserError, match="ckpt_6.pt, the last of this run, could not "
                                                  "be written: .*; the newest is out/ckpt_4.pt"):
        train(resume_from_checkpoint=True)
    assert newest_readable("out", print)[0] == 4
    assert set(samples.losses(workspace / "out/log.json")) == set(range(1, 7))


def test_a_log_that_cannot_be_written_keeps_its_lines(tmp_path):
    log = PersistentFile(tmp_path / "log.json", append=False)
    assert log.append(b"one\n") is None
    with files_of_at_most(6):
        assert "File too large: its lines are kept for later" in log.append(b"two\n")
        assert log.append(b"three\n") is None
    assert "no line is missing" in log.append(b"four\n")
    log.close()
    assert (tmp_path / "log.json").read_text() == "one\ntwo\nthree\nfour\n"


def test_a_log_that_cannot_be_written_at_all_is_named_before_the_training(workspace):
    with pytest.raises(UserError, match="--json_summary /dev/full/log.json: cannot be written"):
        train(json_summary="/dev/full/log.json")
