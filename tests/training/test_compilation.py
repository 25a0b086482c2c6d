"""torch.compile for model and optimizer, on the CPU with backends that need no compiler; and traces of the profiler."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import run_pretraining
from devices.device import Device
from devices.options import PrecisionOptions
from devices.precision import Precision
from modeling import BertForPreTraining
from optim.fused_lamb import CompiledNVLAMB, SlicedNVLAMB
from tests.support import samples
from training.compilation import compile_training


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


def device_compiled_by(compiler) -> Device:
    """Compiled as on Gaudi: the model and a group's update are one graph each."""
    device = Device()
    device.compiler, device.compiles_in_parts = compiler, False
    return device


def lamb(optimizer_class, **settings) -> tuple[torch.optim.Optimizer, list]:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 7), (3,), (4, 4), (9,))]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]
    return optimizer_class(groups, lr=0.1, **settings), params


@pytest.mark.parametrize("in_parts", [False, True])
def test_compiled_lamb_is_compiled_in_the_first_step_and_computes_the_same(in_parts):
    counter, graphs = CompileCounter(), []
    (plain, expected), (compiled, found) = lamb(SlicedNVLAMB), lamb(CompiledNVLAMB, backend=counter, in_parts=in_parts)
    for step in range(1, 6):
        for optimizer, params in ((plain, expected), (compiled, found)):
            for param in params:
                param.grad = torch.full_like(param, 0.1 * step)  # new each time, as after zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.1 / step
            optimizer.step()
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 5 and (in_parts or graphs[0] == 2), "one graph for each group"
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_model_has_the_same_losses_and_names(bf16):
    counter = CompileCounter()
    options = PrecisionOptions(bf16=bf16, bf16_list="ops_bf16_bert_pt.txt", fp32_list="ops_fp32_bert_pt.txt")
    precision = Precision(options, Device())
    torch.manual_seed(0)
    model = BertForPreTraining(samples.config(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), "plain",
                               autocast=precision.autocast, casts_off=precision.casts_off)
    names, batch = set(model.state_dict()), samples.unpacked_batch([9, 24, 13])
    with precision.autocast():
        expected = model(batch)
    compile_training(device_compiled_by(counter), model)
    before = counter.frame_count
    for _ in range(2):
        with precision.autocast():
            found = model(batch)
    assert counter.frame_count == before + (2 if bf16 else 1), "with op lists, the losses are a graph of their own"
    torch.testing.assert_close(found, expected)
    assert set(model.state_dict()) == names


def test_under_autocast_without_lists_the_whole_model_is_one_graph():
    counter, precision = CompileCounter(), Precision(PrecisionOptions(bf16=True), Device())
    torch.manual_seed(0)
    model = BertForPreTraining(samples.config(attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0), "plain",
                               autocast=precision.autocast, casts_off=precision.casts_off)
    batch = samples.unpacked_batch([9, 24, 13])
    with precision.autocast():
        expected = model(batch)["loss"]
    exact = model(batch)["loss"]
    compile_training(device_compiled_by(counter), model)
    before = counter.frame_count
    with precision.autocast():
        found = model(batch)["loss"]
    assert counter.frame_count == before + 1
    torch.testing.assert_close(found, expected)
    assert 0 < (exact - expected).abs() < 0.05, "autocast was real"
    found.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_compiler_that_is_not_there_is_named_and_the_run_continues():
    model = torch.nn.Linear(3, 2)
    compiled, description = compile_training(device_compiled_by("hpu_backend"), model)
    assert not compiled
    assert description.startswith("--use_torch_compile: not compiled: hpu_backend on cpu: ")
    assert model(torch.ones(1, 3)).shape == (1, 2)


@pytest.mark.parametrize("lazy", [False, True])
def test_profile_writes_a_trace_of_the_steps_that_were_asked_for(tmp_path, lazy):
    samples.write_config(tmp_path / "config.json")
    samples.write_dataset(tmp_path / "data", (9,))
    flags = ["--do_train", f"--input_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}", "--skip_checkpoint",
             f"--config_file={tmp_path / 'config.json'}", f"--json_summary={tmp_path / 'log.json'}", "--max_steps=4",
             f"--max_seq_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_seq={samples.PREDICTIONS}",
             "--train_batch_size=4", "--use_torch_lazy" if lazy else "--no_cuda"]
    run_pretraining.main(flags)
    assert not list(tmp_path.glob("trace*"))
    run_pretraining.main([*flags, "--profile", "--profile_steps=2:3"])
    trace = json.loads((tmp_path / "trace_rank0_steps2-3.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name.startswith(f"Optimizer.step#{'' if lazy else 'Sliced'}NVLAMB.step") for name in names) == 2
    assert ("aten::embedding" if lazy else "attention_backward") in names
