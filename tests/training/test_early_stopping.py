"""--early_stopping ends a run at the right evaluation and keeps the best checkpoint, also where it is resumed."""

import math
from pathlib import Path

import pytest

import run_pretraining
from common.errors import UserError
from tests.support import samples, small_run
from tests.support.small_run import flags, train
from training.early_stopping import EarlyStopping

# A rate at which the held-out loss soon rises.
RISING = {"eval_dir": "held_out", "eval_freq": 2, "early_stopping": 2, "max_steps": 30, "lr_schedule": "constant",
          "warmup_proportion": 0.2, "learning_rate": 0.4, "num_steps_per_checkpoint": 1, "train_batch_size": 4,
          "gradient_accumulation_steps": 1, "disable_progress_bar": True}


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_run.write_workspace(tmp_path)


def held_out_losses(log) -> dict[int, float]:
    return {line["step"][1]: line["data"]["eval_mlm_loss"] for line in samples.log_lines(log)
            if "eval_mlm_loss" in line["data"]}


def test_the_run_ends_after_as_many_evaluations_without_a_lower_loss(workspace, capsys):
    train(**RISING)
    losses = held_out_losses(Path("out/log.json"))
    best = min(losses, key=losses.get)
    assert 2 < max(losses) < 30 and max(losses) == best + 2 * RISING["early_stopping"]
    kept = {path.name for path in (workspace / "out").glob("ckpt_*.pt")}
    assert kept == {f"ckpt_{step}.pt" for step in (best, *range(max(losses) - 2, max(losses) + 1))}
    output = capsys.readouterr().out
    assert "2 evaluations without a new lowest loss" in output and f"is that of ckpt_{best}.pt" in output
    train(**RISING, resume_from_checkpoint=True)
    assert held_out_losses(Path("out/log.json")) == losses, "the run that had ended took further steps"

    train(**RISING, output_dir="parts", json_summary="parts/log.json", steps_this_run=max(losses) - 3)
    train(**RISING, output_dir="parts", json_summary="parts/log.json", resume_from_checkpoint=True)
    in_parts = held_out_losses(Path("parts/log.json"))
    in_parts.pop(max(losses) - 3)  # an odd step: the end of the first part
    assert in_parts == losses


def test_a_loss_that_is_not_a_number_counts_as_no_lower_one():
    stopping = EarlyStopping(2)
    assert [stopping.record(loss, step) for step, loss in enumerate((3.0, math.nan, 2.9, 2.9, 3.1))] == [
        True, False, True, False, False]
    assert stopping.is_over and (stopping.lowest_loss, stopping.best_checkpoint) == (2.9, 2)


@pytest.mark.parametrize("state, complaint", [
    ({"lowest_loss": "low"}, "lowest_loss of its early stopping is 'low'"),
    ({"lowest_loss": 1.0, "best_checkpoint": -3}, "best_checkpoint is -3"),
    ({"lowest_loss": 1.0, "best_checkpoint": 3, "evaluations_since": 0.5}, "evaluations_since is 0.5"),
])
def test_malformed_state_in_a_checkpoint_is_named(state, complaint):
    with pytest.raises(UserError, match=complaint):
        EarlyStopping(2).load_state_dict(state, "ckpt_3.pt")


@pytest.mark.parametrize("changes", [{"eval_freq": None}, {"eval_dir": None}, {"skip_checkpoint": True}])
def test_what_it_needs_is_asked_for(workspace, changes, capsys):
    with pytest.raises(SystemExit):
        run_pretraining.main(flags(**{**RISING, **changes}))
    assert "needs --eval_dir" in capsys.readouterr().err
