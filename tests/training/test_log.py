"""The figures in TensorBoard are those of the log, over the steps of both phases."""

import sys

import pytest
import torch

from common.errors import UserError
from tests.support import samples, small_run
from tests.support.small_run import train
from training.log import FIGURES


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return small_run.write_workspace(tmp_path)


def curves(folder) -> dict[str, dict[int, float]]:
    """tag → step → value, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_the_log_says(workspace):
    train(tensorboard_logdir="curves", eval_dir="held_out", eval_freq=3)
    train(tensorboard_logdir="curves", phase2=True, resume_from_checkpoint=True, max_steps=2, json_summary="two.json")
    found = curves("curves")
    tags = {figure.name: figure.tag for figure in FIGURES if figure.tag}
    expected = {tag: {} for tag in tags.values()}
    for path, offset in (("out/log.json", 0), ("two.json", 6)):
        for line in samples.log_lines(workspace / path):
            for key, value in line["data"].items():
                if key in tags and len(line["step"]) == 2:
                    expected[tags[key]][line["step"][1] + offset] = value
    assert list(found["loss/total"]) == list(range(1, 9)) and list(found["held_out/mlm_accuracy"]) == [3, 6]
    for tag, values in expected.items():
        assert found[tag] == pytest.approx(values, rel=1e-6), tag


def test_a_resumed_run_hides_the_steps_that_are_done_again(workspace):
    train(tensorboard_logdir="curves")  # 6 steps, a checkpoint after the 4th
    (workspace / "out/ckpt_6.pt").unlink()
    train(tensorboard_logdir="curves", resume_from_checkpoint=True, max_steps=5)
    assert list(curves("curves")["loss/total"]) == [1, 2, 3, 4, 5]


def test_without_the_package_a_run_is_refused_before_anything_is_written(workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    with pytest.raises(UserError, match="--tensorboard_logdir needs the package tensorboard"):
        train(tensorboard_logdir="curves")
    assert not (workspace / "out").exists() and not (workspace / "curves").exists()
