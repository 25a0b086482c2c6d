"""The figures of the log mean what readers of the reference scripts expect, and docs/log.md lists them."""

import re
from pathlib import Path

import pytest

from modeling import BertForPreTraining
from tests.support import samples, small_run
from training.arguments import parse_arguments
from training.log import FIGURES, PARAMETERS, REFERENCE_KEYS, SUMMARY

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "log.md"
ONLY_ON_CARDS = {  # or with a compiler
    "memory_allocated", "max_memory_allocated", "graph_compilation", "cpu_fallback", "cpu_fallback_ops"}
MICRO_BATCH = 4  # rows, of one sequence each


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 5 steps of 2 micro-batches that logs every second: its lines, the micro-batches' losses, its console."""
    folder = small_run.write_workspace(tmp_path_factory.mktemp("log"))
    losses, printed = [], []
    forward = BertForPreTraining.forward
    with pytest.MonkeyPatch.context() as patch:
        def noted(model, batch):
            outputs = forward(model, batch)
            if model.training:
                losses.append(outputs["loss"].item())
            return outputs

        patch.chdir(folder)
        patch.setattr(BertForPreTraining, "forward", noted)
        patch.setattr("training.log.tqdm.write", printed.append)
        small_run.train(max_steps=5, log_freq="2.0", eval_dir="held_out", max_predictions_per_seq=20, seed=3,
                        dllogger_console=True, peak_tflops=1.0)
    return samples.log_lines(folder / "out/log.json"), losses, printed


def data_of(lines, key: str) -> list[dict]:
    return [line["data"] for line in lines if key in line["data"]]


def test_losses_are_those_of_the_last_micro_batch_of_the_step_and_of_the_steps_since_the_last_line(run):
    lines, losses, _ = run
    steps = data_of(lines, "step_loss")
    assert len(losses) == 10
    assert [line["step"] for line in lines if "step_loss" in line["data"]] == [[0, 2], [1, 4], [1, 5]]
    for line, last, since in zip(steps, (4, 8, 10), (0, 4, 8), strict=True):
        assert line["step_loss"] == pytest.approx(losses[last - 1], rel=1e-6)
        assert line["step_mean_loss"] == pytest.approx(sum(losses[last - 2:last]) / 2, rel=1e-6)
        assert line["average_loss"] == pytest.approx(sum(losses[since:last]) / (last - since), rel=1e-6)


def test_times_and_rates_are_those_of_a_micro_batch_and_of_a_card_from_the_first_line_on(run):
    for line in data_of(run[0], "step_loss"):
        assert line["average_perf_per_step"] * line["average_training_time_step"] == pytest.approx(MICRO_BATCH)
        assert line["step_time"] == pytest.approx(2 * line["average_training_time_step"])
        assert line["sequences_per_second"] == pytest.approx(line["average_perf_per_step"])


def test_the_final_loss_stands_in_the_last_steps_line_and_in_the_summary(run):
    lines = run[0]
    *_, last = data_of(lines, "step_loss")
    assert [line["step"] for line in lines if "final_loss" in line["data"]] == [[1, 5], []]
    summary = lines[-1]["data"]
    assert last["final_loss"] == last["average_loss"] == summary["final_loss"]
    assert summary["training_sequences_per_second"] * summary["raw_train_time"] == pytest.approx(5 * 2 * MICRO_BATCH)
    assert 0 < summary["raw_train_time"] < summary["e2e_train_time"]


def test_parameters_of_the_reference_scripts_are_logged(run):
    lines = run[0]
    first = lines[0]["data"]
    assert (first["SEED"], first["train_start"], first["batch_size_per_pu"]) == (3, True, MICRO_BATCH)
    assert first["learning_rate"] == 0.01
    assert first["Config"][0].startswith("Namespace(") and "seed=3" in first["Config"][0]
    assert [line["data"]["checkpoint_step"] for line in lines if line["step"] == "PARAMETER"
            and "checkpoint_step" in line["data"]] == [4, 5]


def test_a_line_begins_with_the_figures_of_the_reference_scripts_in_their_order(run):
    *others, last = data_of(run[0], "step_loss")
    names = list(REFERENCE_KEYS)
    assert list(last)[:6] == names and all(list(line)[:5] == names[:-1] for line in others)


def test_the_console_shows_the_lines_as_dllogger_prints_them(run):
    lines, _, printed = run
    shown = [text for text in printed if text.startswith("DLL ")]
    assert len(shown) == len(lines)
    line = next(line for line in lines if line["step"] == [1, 4] and "step_loss" in line["data"])
    figures = "".join(f" {name} : {line['data'][name]} " for name in ("average_loss", "step_loss", "learning_rate"))
    assert any(text.startswith(f"DLL {line['datetime']} - Training Epoch: 1 Training Iteration: 4 {figures}")
               for text in shown)
    assert re.match(r"DLL \d{4}-\d\d-\d\d [\d:.]+ - PARAMETER Config : \[", shown[0])
    assert re.match(r"DLL [-\d]+ [\d:.]+ -  e2e_train_time : [\d.]+  training_sequences_per_second : ", shown[-1])


def test_dllogger_lines_are_off_by_default_and_the_usual_lines_stay(run):
    assert not parse_arguments(small_run.flags()).dllogger_console
    assert sum(text.startswith("epoch ") for text in run[2]) == 3


def table_rows(figures) -> list[str]:
    return [f"| `{figure.name}` | {figure.unit} | {figure.meaning} |" for figure in figures]


@pytest.mark.parametrize("title, figures", [("Parameters", PARAMETERS), ("Steps", FIGURES), ("Summary", SUMMARY)])
def test_the_page_lists_the_figures_with_unit_and_meaning(title, figures):
    """A row that differs is printed as it should read."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {title}\n")[1].split("\n## ")[0]
    assert [row for row in section.splitlines() if row.startswith("| `")] == table_rows(figures)


def test_a_run_writes_exactly_the_keys_that_are_listed(run):
    written = {"PARAMETER": set(), "step": set(), "summary": set()}
    for line in run[0]:
        kind = line["step"] if line["step"] == "PARAMETER" else "step" if line["step"] else "summary"
        written[kind] |= set(line["data"])
    flags = set(vars(parse_arguments(small_run.flags())))
    assert written["PARAMETER"] == flags | {figure.name for figure in PARAMETERS}
    others = ONLY_ON_CARDS | {"warning", "sources"}
    assert written["step"] - others == {figure.name for figure in FIGURES} - others
    assert written["summary"] == {figure.name for figure in SUMMARY}
