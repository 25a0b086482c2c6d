"""The picture of a run, from logs of the trainer, of its earlier versions, and of the reference scripts."""

import json

import pytest
from matplotlib.image import imread

import export_to_huggingface
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


def write_lines(path, lines: list[tuple]) -> str:
    """A log of (step, data) in dllogger's form."""
    path.write_text("".join("DLLL " + json.dumps({
        "timestamp": "1600000000.0", "datetime": "2020-09-13 12:26:40", "elapsedtime": "1.0", "type": "LOG",
        "step": step, "data": data}) + "\n" for step, data in lines))
    return str(path)


def reference_log(path, steps: int, log_freq: int = 1, cards: str = ", world_size=8", phase2: bool = False) -> str:
    """As Habana's script writes it on 8 cards; without `cards` as NVIDIA's does."""
    config = ("Namespace(amp=False, bert_model='bert-large-uncased', gradient_accumulation_steps=4, init_checkpoint="
              f"None, learning_rate=0.006, max_steps=7038.0, output_dir='/out', phase1_end_step=20, phase2={phase2}, "
              f"resume_from_checkpoint={phase2}, resume_step=-1, train_batch_size=64, warmup_proportion=0.2843{cards})")
    lines = [("PARAMETER", {"Config": [config]}), ("PARAMETER", {"SEED": 42}), ("PARAMETER", {"train_start": True}),
             ("PARAMETER", {"batch_size_per_pu": 64}), ("PARAMETER", {"learning_rate": 0.006})]
    speed = {"average_training_time_step": 0.5, "average_perf_per_step": 128.0}
    lines += [([0, step], {"average_loss": 9.0 / step, "step_loss": 9.5 / step, "learning_rate": 0.1 * step, **speed})
              for step in range(log_freq, steps, log_freq)]
    lines += [([0, steps], {"final_loss": 9.0 / steps, **speed}), ("PARAMETER", {"checkpoint_step": steps}),
              ([], {"e2e_train_time": 9.0, "training_sequences_per_second": 1000.0, "final_loss": 9.0 / steps,
                    "raw_train_time": 8.0})]
    return write_lines(path, lines)


@pytest.mark.parametrize("log_freq, steps", [(1, list(range(1, 26))), (10, [10, 20, 25])])
def test_a_log_of_the_reference_script_is_one_run_over_both_phases(tmp_path, log_freq, steps):
    runs = []
    add_curves(runs, reference_log(tmp_path / "one.json", 20, log_freq))
    add_curves(runs, reference_log(tmp_path / "two.json", 5, log_freq, phase2=True))
    assert [(run.name, run.phase2_start) for run in runs] == [("/out", 20)]
    curves = runs[0].curves
    assert list(curves["average_loss"]) == steps and curves["average_loss"][20] == 9.0 / 20  # the final loss
    assert set(curves["step_time"].values()) == {0.5 * 4}
    assert set(curves["sequences_per_second"].values()) == {128.0 * 8}


def test_logs_of_both_are_drawn_side_by_side_and_reported(tmp_path, capsys):
    logs = [write_log(tmp_path / "ours.json", 9), reference_log(tmp_path / "dllogger.json", 9)]
    plot_training.main([*logs, "--output", str(tmp_path / "both.png"), "--report", str(tmp_path / "both.html")])
    assert imread(tmp_path / "both.png").std() > 0.01
    page = (tmp_path / "both.html").read_text()
    assert "1,024 sequences/s" in page and "--train_batch_size" not in page


@pytest.mark.parametrize("config", [None, [], ["Namespace("], ["f(x)"], [7], ["Namespace(device=device(type='hpu'))"]])
def test_a_log_whose_flags_cannot_be_read_still_has_its_losses(tmp_path, config):
    runs = []
    lines = [("PARAMETER", {"Config": config}), ([0, 1], {"average_loss": 3.0, "average_perf_per_step": 5.0})]
    add_curves(runs, write_lines(tmp_path / "log.json", lines))
    assert runs[0].curves["average_loss"] == {1: 3.0} and "sequences_per_second" not in runs[0].curves


def test_without_a_number_of_cards_the_rate_of_all_is_not_guessed(tmp_path):
    runs = []
    add_curves(runs, reference_log(tmp_path / "nvidia.json", 5, cards=""))
    assert "sequences_per_second" not in runs[0].curves and runs[0].curves["step_time"][5] == 2.0


def test_figures_of_earlier_versions_get_their_present_names(tmp_path):
    """They logged the time of a step, the rate of all cards and the step's mean loss under the reference's names."""
    figures = {"average_loss": 5.0, "step_loss": 4.5, "average_training_time_step": 2.0, "average_perf_per_step": 640.0}
    lines = [("PARAMETER", {"output_dir": "out", "phase2": False, "world_size": 8}), ([0, 7], figures),
             ([], {"training_sequences_per_second": 700.0, "final_loss": 5.0})]
    runs = []
    add_curves(runs, write_lines(tmp_path / "old.json", lines))
    assert runs[0].curves == {"average_loss": {7: 5.0}, "step_mean_loss": {7: 4.5}, "step_time": {7: 2.0},
                              "sequences_per_second": {7: 640.0}}
    [phase] = export_to_huggingface.logged_phases(str(tmp_path / "old.json"))
    assert (phase["steady_sequences_per_second"], phase["final_loss"], phase["last step"]) == (700.0, 5.0, 7)


def test_the_model_card_reads_logs_of_the_reference_script(tmp_path):
    path = reference_log(tmp_path / "two.json", 5, phase2=True)
    [phase] = export_to_huggingface.logged_phases(path)
    assert (phase["phase"], phase["max_steps"], phase["last step"]) == (2, 7038, 5)
    assert phase["final_loss"] == 9.0 / 5 and phase["training_sequences_per_second"] == 1000.0


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
