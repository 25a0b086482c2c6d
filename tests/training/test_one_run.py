"""A folder belongs to one run at a time; a run of several ranks is one."""

import json
import signal
import sys
from pathlib import Path

import pytest

from checkpoint.async_writer import CheckpointWriter
from checkpoint.folder import saved_steps
from common.errors import UserError
from common.locks import LOCK_NAME
from tests.support import ranks, samples, small_run
from tests.support.held_folder import held_folder, other_host
from tests.support.small_run import flags, train
from training.trainer import Trainer

STEPS = 9
TWICE = flags(max_steps=STEPS, num_steps_per_checkpoint=2, resume_from_checkpoint=True, use_cpu_kernels=False)


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_run.write_workspace(tmp_path)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_of_two_trainings_that_start_at_once_one_trains(workspace, elsewhere):
    """Both take the same time until they ask for the folder, so that either may be the one that is refused."""
    prefix = other_host() if elsewhere else ()
    with (ranks.started([*ranks.TRAIN, *TWICE], workspace, output="a.txt") as first,
          ranks.started([*prefix, *ranks.TRAIN, *TWICE], workspace, output="b.txt") as second):
        ends = [first.finish(), second.finish()]
    codes = {done.returncode for done in ends}
    assert codes == {0, 2} or elsewhere and codes == {0}  # there it may be over before it gives a sign of life
    assert any("--output_dir out: in use by run_pretraining.py, process " in done.stdout for done in ends)
    assert not any("Traceback" in done.stdout for done in ends)
    assert [line["step"][1] for line in samples.log_lines(workspace / "out/log.json")
            if "step_loss" in line["data"]] == [*range(1, STEPS + 1)]
    assert sorted(path.name for path in (workspace / "out").iterdir()) == [
        *(f"ckpt_{step}.pt" for step in (6, 8, 9)), "log.json"]


def test_a_folder_or_log_in_use_is_refused_and_a_dry_run_writes_to_neither(workspace):
    with held_folder(workspace / "out") as owner:
        with pytest.raises(UserError, match=f"--output_dir out: in use by .*, process {owner.pid} on host"):
            train(max_steps=1)
        train(max_steps=1, dry_run=True)
        assert [path.name for path in Path("out").iterdir()] == [LOCK_NAME]
        train(max_steps=1, output_dir="other", json_summary="/dev/null")
    with held_folder(workspace / "logs") as owner:
        (workspace / "logs" / LOCK_NAME).rename(workspace / f"logs/.log.json{LOCK_NAME}")
        with pytest.raises(UserError, match=f"--json_summary logs/log.json: in use by .*, process {owner.pid} on"):
            train(max_steps=1, json_summary="logs/log.json")


def test_a_run_that_fails_leaves_no_lock_and_no_folder(workspace):
    with pytest.raises(UserError, match="--max_seq_length is 23"):
        train(output_dir="new/out", json_summary="new/log.json", max_seq_length=23)
    assert not (workspace / "new").exists()


def test_a_run_that_was_told_to_end_says_so_in_its_lock(workspace, monkeypatch):
    train_step, close, seen = Trainer.train_step, CheckpointWriter.close, []

    def told_to_end(self, step):
        self.signals.receive(signal.SIGTERM, None)
        return train_step(self, step)

    def looked_at(self):
        seen.extend(Path("out", LOCK_NAME).read_text().splitlines())
        close(self)

    monkeypatch.setattr(Trainer, "train_step", told_to_end)
    monkeypatch.setattr(CheckpointWriter, "close", looked_at)
    train()
    assert json.loads(seen[0])["pid"] and seen[1:] == ["ending"]
    assert saved_steps("out") == [1]


@ranks.needs_mpirun
def test_all_ranks_of_a_refused_run_end_with_one_line(workspace):
    with held_folder(workspace / "out") as owner:
        done = ranks.run(ranks.mpirun(2, sys.executable, ranks.TRAIN[1], *ranks.flags(2, "out")), workspace)
    assert done.returncode == 2
    assert done.stdout.count("error:") == 1
    assert f"error: rank 0: --output_dir out: in use by -c, process {owner.pid} on host" in done.stdout
