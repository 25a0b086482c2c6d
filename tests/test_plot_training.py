"""The picture of a run, from logs as the trainer writes them."""

import pytest
from matplotlib.image import imread

import plot_training
from common.errors import UserError
from training.curves import RunCurves, add_curves, line_segments
from training.log import TrainingLog, read_log


def write_log(path, steps, phase2=False, output_dir="out", held_out=True):
    log = TrainingLog(path, active=True, append=False)
    log.write("PARAMETER", {"output_dir": output_dir, "phase2": phase2, "phase1_end_step": 20,
                            "resume_from_checkpoint": phase2})
    for step in range(1, steps + 1):
        log.write([0, step], {"average_loss": 9.0 / step, "learning_rate": 0.1 * step, "average_perf_per_step": 50.0})
    if held_out:
        log.write([0, steps], {"eval_mlm_loss": 5.0, "eval_mlm_accuracy": 0.2, "eval_nsp_accuracy": 0.6})
    log.write([], {"final_loss": 9.0 / steps})
    log.close()
    return str(path)


def test_phases_of_a_run_are_joined(tmp_path):
    runs = []
    add_curves(runs, write_log(tmp_path / "one.json", 20))
    add_curves(runs, write_log(tmp_path / "two.json", 5, phase2=True))
    assert len(runs) == 1 and list(runs[0].curves["average_loss"]) == list(range(1, 26))
    assert runs[0].phase2_start == 20


def test_runs_that_share_a_folder_name_stay_apart(tmp_path):
    runs = []
    for folder, steps in (("a", 20), ("b", 9)):
        (tmp_path / folder).mkdir()
        add_curves(runs, write_log(tmp_path / folder / "one.json", steps))
        add_curves(runs, write_log(tmp_path / folder / "two.json", 3, phase2=True))
    assert [(run.name, len(run.curves["average_loss"])) for run in runs] == [
        ("out", 23), (str(tmp_path / "b/one.json"), 12)]


def test_a_step_logged_twice_counts_as_it_was_logged_last(tmp_path):
    path = tmp_path / "log.json"
    write_log(path, 5, held_out=False)
    interrupted = path.read_text().replace("9.0", "7.0")
    write_log(path, 9, held_out=False)
    resumed = path.read_text().replace('"resume_from_checkpoint": false', '"resume_from_checkpoint": true')
    path.write_text(interrupted + resumed)
    runs = []
    add_curves(runs, str(path))
    assert runs[0].curves["average_loss"] == {step: 9.0 / step for step in range(1, 10)}


def test_the_line_to_compare_with_spans_its_phase():
    run = RunCurves("a", "a", {"average_loss": dict.fromkeys(range(1, 26), 5.0)}, phase2_start=20)
    run.curves["eval_context_free_mlm_loss"] = {10: 6.5, 20: 6.4, 25: 6.1}
    assert line_segments(run, "eval_context_free_mlm_loss") == [(0, 20, 6.4), (20, 25, 6.1)]
    del run.curves["eval_context_free_mlm_loss"][25]
    assert line_segments(run, "eval_context_free_mlm_loss") == [(0, 20, 6.4)]
    assert line_segments(run, "average_nsp_loss") == []


def test_the_picture_is_drawn(tmp_path):
    logs = [write_log(tmp_path / "one.json", 20), write_log(tmp_path / "other.json", 9, output_dir="b", held_out=False)]
    plot_training.main([*logs, "--output", str(tmp_path / "curves.png")])
    assert imread(tmp_path / "curves.png").std() > 0.01


def test_the_readable_part_of_a_cut_log_is_drawn(tmp_path):
    path = tmp_path / "log.json"
    write_log(path, 20)
    path.write_bytes(path.read_bytes()[:-40])
    assert len(read_log(str(path))) == 22
    path.write_text("no log\n")
    with pytest.raises(UserError, match="not a log of run_pretraining.py"):
        plot_training.main([str(path)])
    with pytest.raises(UserError, match="nowhere.json: No such file"):
        plot_training.main([str(tmp_path / "nowhere.json")])
