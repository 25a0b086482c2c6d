"""What a run does about signals, numbers that are not finite, and shards that rot."""

import signal
import subprocess
import sys
import time

import h5py
import pytest
import torch

import modeling
import run_pretraining
from checkpoint.folder import read_checkpoint, saved_steps
from common.errors import UserError
from data import dataloader as dataset
from tests.support import gaudi, ranks, samples, small_run
from tests.support.small_run import flags, logged_steps, train

LONG = {"max_steps": 100_000, "num_steps_per_checkpoint": 100_000}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_run.write_workspace(tmp_path)


# --- signals ---

@pytest.mark.parametrize("number, variables, code, resume", [
    (signal.SIGTERM, {}, 0, True),
    (signal.SIGINT, {"TORCHELASTIC_MAX_RESTARTS": "3"}, run_pretraining.STOPPED, False),  # torchrun goes on by itself
])
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(workspace, monkeypatch, number, variables, code, resume):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with ranks.started([*ranks.TRAIN, *flags(**LONG)], workspace) as job:
        job.wait_for("step 2 ")
        job.process.send_signal(number)
        done = job.finish(seconds=60)
    assert done.returncode == code, done.stdout
    last = max(samples.losses(workspace / "out/log.json"))
    assert f"stopping after step {last}: {number.name} asked for it" in done.stdout
    assert saved_steps("out") == [last]
    *lines, summary = samples.log_lines(workspace / "out/log.json")
    assert summary["step"] == [] and [line["step"][1] for line in lines if "final_loss" in line["data"]] == [last]
    train(**LONG | {"max_steps": 100_000, "steps_this_run": last + 2, "resume_from_checkpoint": resume})
    assert set(samples.losses(workspace / "out/log.json")) == set(range(1, last + 3))


def test_a_second_signal_ends_a_run_at_once(workspace):
    """The step in hand is stopped from outside, so that the run is still in it when the second one comes."""
    with ranks.started([*ranks.TRAIN, *flags(**LONG, train_batch_size=4000, gradient_accumulation_steps=1000)],
                       workspace) as job:
        job.wait_for("reduction of gradients")  # the first of the minutes of a step begins
        time.sleep(4.0)
        job.process.terminate()
        time.sleep(2.5)  # what comes sooner may be the same signal, repeated by a launcher
        assert job.process.poll() is None
        job.process.terminate()
        assert job.finish(seconds=20).returncode == -signal.SIGTERM
    assert saved_steps("out") == []


# --- numbers ---

def poison(monkeypatch, calls: set[int]) -> None:
    """Let some calls of the model, counted from 1, return a loss that is not a number."""
    forward, count = modeling.BertForPreTraining.forward, iter(range(1, 10_000))

    def poisoned(self, batch):
        outputs = forward(self, batch)
        return outputs | {"loss": outputs["loss"] * float("nan")} if next(count) in calls else outputs

    monkeypatch.setattr(modeling.BertForPreTraining, "forward", poisoned)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(workspace, monkeypatch, fused):
    """One of the two micro-batches of step 5.  Weights and moments stay; data, rate and step count continue."""
    train(output_dir="sound", json_summary="sound.json", use_fused_lamb=fused)
    poison(monkeypatch, {10})
    train(num_steps_per_checkpoint=1, use_fused_lamb=fused)
    before, skipped = (read_checkpoint(f"out/ckpt_{step}.pt") for step in (4, 5))
    assert all(torch.equal(before["model"][name], skipped["model"][name]) for name in before["model"])
    for number, moments in before["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], skipped["optimizer"]["state"][number][key]) for key in moments)
    assert [group["step"] for group in skipped["optimizer"]["param_groups"]] == [5, 5]
    assert (skipped["step"], skipped["data"]["rows"]) == (5, 5 * 8)
    sound, found = logged_steps(workspace / "sound.json"), logged_steps(workspace / "out/log.json")
    assert [found[step] for step in range(1, 5)] == [sound[step] for step in range(1, 5)]
    assert found[5]["step_loss"] is None and found[5]["gradient_norm"] is None
    assert [found[step]["skipped_steps"] for step in (4, 5, 6)] == [0, 1, 1]
    assert [found[step]["learning_rate"] for step in (5, 6)] == [sound[step]["learning_rate"] for step in (5, 6)]


def test_too_many_skipped_steps_end_the_run_and_leave_the_last_good_checkpoint(workspace, monkeypatch):
    poison(monkeypatch, set(range(9, 100)))  # from step 5 on
    with pytest.raises(UserError, match=r"step 7: 3 steps in a row were skipped.*--max_skipped_steps 3.*out/ckpt_4.pt"):
        train(max_steps=20, max_skipped_steps=3)
    assert saved_steps("out") == [4]
    assert all(torch.isfinite(weight).all() for weight in read_checkpoint("out/ckpt_4.pt")["model"].values())


def test_skipped_steps_in_a_row_are_counted_across_a_restart(workspace, monkeypatch):
    poison(monkeypatch, set(range(9, 100)))
    train(max_steps=20, max_skipped_steps=3, steps_this_run=6)
    with pytest.raises(UserError, match="step 7: 3 steps in a row were skipped"):
        train(max_steps=20, max_skipped_steps=3, resume_from_checkpoint=True)


def test_with_gaudis_fused_lamb_losses_that_are_not_finite_are_counted_and_end_the_run(workspace):
    """They are found when step 4 is logged, and no checkpoint is written."""
    train(max_steps=1)
    state = torch.load("out/ckpt_1.pt", weights_only=True)
    state["model"]["cls.predictions.transform.dense_act.weight"][0, 0] = float("nan")
    torch.save({"model": state["model"]}, "spoiled.pt")
    command = flags(no_cuda=None, use_habana=True, use_fused_lamb=True, init_checkpoint="spoiled.pt", output_dir="hpu",
                    log_freq=2, num_steps_per_checkpoint=100, max_skipped_steps=3)
    done = gaudi.run([ranks.ROOT / "run_pretraining.py", *command], cwd=workspace)
    assert done.returncode == 2, done.stderr
    assert "step 4: 4 steps in a row were skipped" in done.stderr.splitlines()[-1]
    assert saved_steps("hpu") == []


@pytest.mark.slow
@ranks.needs_mpirun
def test_all_ranks_skip_the_step_that_is_not_finite_on_one(workspace):
    program = ranks.ROOT / "tests/support/rank_programs/poisoned_rank.py"
    command = ranks.mpirun(2, sys.executable, program, *ranks.flags(2, "out", max_steps=4, skip_checkpoint=None))
    done = ranks.run(command, workspace)
    assert done.returncode == 0, done.stdout
    assert list(ranks.figures(workspace / "out.json", "skipped_steps").values()) == [0, 1, 1, 1]
    assert ranks.figures(workspace / "out.json", "gradient_norm")[4] is not None


# --- data ---

def rot(path, row: int, value: int = 40_000) -> None:
    """A token that is in no vocabulary, in one row of a shard."""
    with h5py.File(path, "a") as file:
        file["input_ids"][row, 3] = value


def test_a_shard_that_rots_during_a_run_is_named_with_its_row_before_the_model_sees_it(workspace, monkeypatch):
    monkeypatch.setattr(dataset, "ROWS_CHECKED_FIRST", 0)  # a large data set is checked as its shards' turns come
    rot(workspace / "data/sample_training_1.hdf5", 9)
    with pytest.raises(UserError, match="sample_training_1.hdf5: input_ids of row 9 holds 40000, not from 0 to 30521"):
        train(max_steps=20)


@pytest.mark.parametrize("damage", [lambda path: rot(path, 9), lambda path: path.write_bytes(path.read_bytes()[:-500])],
                         ids=["impossible value", "truncated"])
def test_bad_shards_are_skipped_where_the_user_says_so(workspace, capsys, damage):
    damage(workspace / "data/sample_training_1.hdf5")
    train(max_steps=9, skip_bad_shards=True, output_dir="whole", json_summary="whole.json")
    figures = logged_steps(workspace / "whole.json")
    output = capsys.readouterr()
    assert "sample_training_1.hdf5" in output.out + output.err and "skipped from" in output.out + output.err
    assert set(figures) == set(range(1, 10))
    for step in range(1, 10):  # and a run that stops after every step meets the fault in the same place
        train(max_steps=9, steps_this_run=step, skip_bad_shards=True, resume_from_checkpoint=True)
    assert logged_steps(workspace / "out/log.json") == figures


def test_skipped_shards_are_counted_in_the_log(workspace):
    rot(workspace / "data/sample_training_1.hdf5", 9)
    train(max_steps=9, skip_bad_shards=True)
    counts = [figures["skipped_shards"] for figures in logged_steps(workspace / "out/log.json").values()]
    assert counts == sorted(counts) and counts[-1] == 1
    warnings = [line["data"]["warning"] for line in samples.log_lines(workspace / "out/log.json")
                if "warning" in line["data"]]
    assert len(warnings) == 1 and "input_ids of row 9 holds 40000" in warnings[0]


def test_without_any_sound_shard_a_run_ends(workspace):
    for number in range(3):
        rot(workspace / f"data/sample_training_{number}.hdf5", 0)
    with pytest.raises(UserError, match="no readable shard is left"):
        train(skip_bad_shards=True)


@pytest.mark.slow
@ranks.needs_mpirun
def test_two_ranks_leave_out_a_bad_shard_together(workspace):
    rot(workspace / "data/sample_training_1.hdf5", 9)
    command = {"max_steps": 6, "skip_bad_shards": True}
    for count in (1, 2):
        launcher = ranks.mpirun(2) if count == 2 else []
        done = subprocess.run([*launcher, *ranks.TRAIN, *ranks.flags(count, f"out_{count}", **command)], cwd=workspace,
                              env=ranks.environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (ranks.figures(workspace / f"out_{count}.json", "skipped_shards") for count in (1, 2))
    assert one == two and one[6] == 1
