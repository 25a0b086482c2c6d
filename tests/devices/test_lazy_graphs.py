"""What training costs a lazy device, and that it computes there what it computes on a CPU."""

import pytest
import torch

import lazy_graphs
import run_pretraining
from devices.lazy import LazyDevice
from lamb import NVLAMB
from tests.support import samples
from training.compilation import GraphWatch


def test_a_training_step_is_one_graph_a_micro_step_and_one_for_the_optimizer():
    runs = lazy_graphs.all_runs()
    assert {(run["data"], run["precision"]) for run in runs} == {
        (data, precision) for data in ("unpacked", "packed") for precision in ("fp32", "op lists")}
    for run in runs:
        assert run["graphs_per_micro_step"] == run["graphs_per_optimizer_step"] == 1, run
        assert run["host_fetches_between_logs"] == run["compiles_after_step_3"] == 0, run
        assert run["unlowered_ops"] == [], run


def test_weights_of_tokens_add_no_graph_and_no_fetch(tmp_path):
    lazy_graphs.write_data(tmp_path)
    run = lazy_graphs.counted_run(tmp_path, "unpacked", 1.0, ["--normalize_loss=tokens"])
    assert run == {"graphs_per_micro_step": 1, "graphs_per_optimizer_step": 1, "host_fetches_between_logs": 0,
                   "compiles_after_step_3": 0, "unlowered_ops": []}


def test_the_counters_see_what_a_careless_optimizer_costs(monkeypatch, tmp_path):
    def careless_step(optimizer):
        for group in optimizer.param_groups:
            for param in group["params"]:
                if (param.grad * param.grad).sum().item() > 0:
                    param.data.sub_(param.grad / (1.0 + torch.linalg.vector_norm(param)), alpha=group["lr"])

    monkeypatch.setattr(NVLAMB, "step", careless_step)
    lazy_graphs.write_data(tmp_path)
    run = lazy_graphs.counted_run(tmp_path, "unpacked", 1.0, [])
    assert run["graphs_per_optimizer_step"] > 40 and run["host_fetches_between_logs"] > 40 * lazy_graphs.STEPS
    assert "aten::linalg_vector_norm" in run["unlowered_ops"]


@pytest.fixture(scope="module")
def step_losses(tmp_path_factory):
    """A function that trains 20 steps without dropout and gives the losses of all of them, by the flags."""
    folder = tmp_path_factory.mktemp("losses")
    samples.write_config(folder / "config.json", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    samples.write_dataset(folder / "data")

    def trained(*flags) -> torch.Tensor:
        run_pretraining.main([
            "--do_train", f"--input_dir={folder / 'data'}", f"--config_file={folder / 'config.json'}", "--no_cuda",
            f"--output_dir={folder / 'none'}", "--skip_checkpoint", f"--json_summary={folder / 'log.json'}",
            f"--max_seq_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_seq={samples.PREDICTIONS}",
            "--train_batch_size=8", "--gradient_accumulation_steps=2", "--max_steps=20", "--warmup_proportion=0.3",
            "--learning_rate=0.01", *flags])
        found = samples.losses(folder / "log.json")
        assert list(found) == list(range(1, 21))
        return torch.tensor(list(found.values()))

    return trained


LISTS = ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt"]


def test_lazy_losses_are_those_of_the_cpu_and_op_lists_err_no_more_than_autocast(step_losses):
    exact = step_losses()
    assert exact[-1] < exact[0] - 0.1
    assert (step_losses("--use_torch_lazy") - exact).abs().max() <= 1e-5
    autocast = (step_losses("--hmp") - exact).abs()
    for device in ([], ["--use_torch_lazy"]):
        by_lists = (step_losses(*LISTS, *device) - exact).abs()
        assert 0 < by_lists.max() <= 3 * autocast.max()
        assert by_lists.mean() <= 3 * autocast.mean()


def test_graphs_that_compile_after_the_warm_up_are_noticed():
    device = LazyDevice()
    watch = GraphWatch(device)

    def compute(size):
        result = torch.ones(size).to(device.torch_device) * 3.25
        device.mark_step()  # computes what somebody still holds
        return result

    compute(101)
    assert watch.new_graphs(steps=2) == 0, "in the warm-up"
    compute(102)
    assert watch.new_graphs(steps=4) == 0, "the warm-up lay in between"
    compute(102)
    assert watch.new_graphs(steps=6) == 0, "a shape that was met before"
    with watch.paused():
        compute(103)
    assert watch.new_graphs(steps=8) == 0, "no training"
    compute(104)
    assert watch.new_graphs(steps=10) == 1
    assert watch.new_graphs(steps=12) == 0


def test_a_run_warns_of_graphs_that_keep_compiling(tmp_path, monkeypatch, capsys):
    sizes = iter(range(1000, 2000))
    mark_step = LazyDevice.mark_step

    def with_a_changing_shape(device):
        device.held = torch.ones(next(sizes)).to(device.torch_device) * 3.25
        mark_step(device)

    monkeypatch.setattr(LazyDevice, "mark_step", with_a_changing_shape)
    samples.write_config(tmp_path / "config.json")
    samples.write_dataset(tmp_path / "data", (9,))
    run_pretraining.main([
        "--do_train", "--use_torch_lazy", f"--input_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}",
        f"--config_file={tmp_path / 'config.json'}", f"--json_summary={tmp_path / 'log.json'}", "--log_freq=2",
        f"--max_seq_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_seq={samples.PREDICTIONS}",
        "--train_batch_size=4", "--max_steps=6"])
    warnings = [line for line in capsys.readouterr().out.splitlines() if "the warm-up is over" in line]
    assert len(warnings) == 1 and "graphs compiled" in warnings[0]
    compiled = [line["data"]["graph_compilation"] for line in samples.log_lines(tmp_path / "log.json")
                if "graph_compilation" in line["data"]]
    assert len(compiled) == 3 and compiled[2] >= compiled[1] + 4, "two steps of two marks"
