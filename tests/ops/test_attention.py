"""The implementations of attention, how a run chooses one, and every variant of a step against the plain one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import run_pretraining
from devices.device import Device
from devices.precision import Precision
from lamb import NVLAMB
from modeling import BertForPreTraining
from ops import attention, cpu_kernels
from ops.attention import ATTENTIONS, AttentionImplementation
from optim.build import parameter_groups
from optim.fused_lamb import CpuFusedNVLAMB, MultiTensorNVLAMB, SlicedNVLAMB
from tests.support import samples
from training.arguments import parse_arguments, precision_options
from training.trainer import Trainer


class DeviceWith(Device):
    """A CPU on which a run chooses from the attentions given."""

    def __init__(self, *attentions: str):
        super().__init__()
        self.attentions = attentions


def arguments(*flags: str):
    return parse_arguments(["--do_train", "--input_dir=data", "--config_file=config.json", "--output_dir=out",
                            "--max_seq_length=24", *flags])


def choose(device, dtype=torch.float32, use_cpu_kernels=False, attention_name=None) -> tuple[str, str]:
    """What a run on micro-batches of 3 x 24 tokens takes."""
    return attention.choose(device, samples.config(), attention.LayerRequest(
        attention=attention_name, use_cpu_kernels=use_cpu_kernels, compiled=False, dtype=dtype, rows=3, length=24))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=1, max_size=4))
def test_bounds_are_where_the_sequences_begin(rows):
    """Rows of three sequences and padding."""
    numbers = [[place + 1 for place, count in enumerate(lengths) for _ in range(count)] for lengths in rows]
    mask = torch.tensor([row + [0] * (13 - len(row)) for row in numbers])
    bounds = attention.sequence_bounds(mask, slots=3).tolist()
    expected = [place for place in range(mask.numel())
                if place % 13 == 0 or mask.flatten()[place] != mask.flatten()[place - 1]]
    assert bounds == expected + [mask.numel()] * (7 * len(rows) + 1 - len(expected))


def test_a_run_takes_the_attention_that_is_clearly_fastest(monkeypatch):
    def slow(*inputs):
        for _ in range(200):
            attention.plain_attention(*inputs)
        return attention.plain_attention(*inputs)

    monkeypatch.setitem(ATTENTIONS, "slow", AttentionImplementation(slow, attention.attention_mask))
    for order in (("slow", "sdpa"), ("sdpa", "slow")):
        name, description = choose(DeviceWith(*order))
        assert name == "sdpa" and "slow" in description and "ms a layer" in description


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_takes_no_attention_that_fails_or_is_wrong(monkeypatch, dtype):
    def failing(*inputs):
        raise NotImplementedError("no such kernel")

    def blind(query, key, value, mask, dropout_prob):
        return attention.plain_attention(query, key, value, torch.zeros_like(mask), dropout_prob)

    monkeypatch.setitem(ATTENTIONS, "failing", AttentionImplementation(failing, attention.attention_mask))
    monkeypatch.setitem(ATTENTIONS, "blind", AttentionImplementation(blind, attention.attention_mask))
    name, description = choose(DeviceWith("failing", "blind", "sdpa"), dtype)
    assert name == "sdpa"
    assert "failing fails: NotImplementedError: no such kernel" in description and "blind is off by" in description


def test_the_flag_and_the_only_attention_of_a_device_are_taken_unmeasured():
    assert choose(DeviceWith("plain"))[0] == "plain"
    assert choose(DeviceWith("plain"), attention_name="varlen")[0] == "varlen"
    assert choose(Device(), use_cpu_kernels=True)[0] == "kernels"


def test_a_run_takes_no_kernels_for_short_vectors(monkeypatch):
    monkeypatch.setattr(cpu_kernels.load(), "lanes", 4)
    name, description = choose(DeviceWith("sdpa"), use_cpu_kernels=True)
    assert name == "sdpa" and "where a vector holds 4 numbers" in description


VARIANTS = {
    "sdpa": {"attention_name": "sdpa"},
    "varlen": {"attention_name": "varlen"},
    "hashed": {"attention_name": "hashed"},
    "kernels and fused LAMB": {"attention_name": "kernels", "optimizer": CpuFusedNVLAMB},
    "chunked loss": {"loss_chunk": 5},
    "recomputed layers": {"checkpoint_activations": True},
    "all of them": {"attention_name": "varlen", "loss_chunk": 7, "checkpoint_activations": True,
                    "optimizer": MultiTensorNVLAMB},
}
LENGTHS, ROWS = [24, 5, 11, 17, 8, 9], [[0], [1, 3], [2, 4]]


def losses_of_steps(form: str, flags: list[str], attention_name: str = "plain", optimizer=SlicedNVLAMB,
                    **choices) -> torch.Tensor:
    """The losses of 20 steps without dropout, all from the same weights."""
    precision = Precision(precision_options(arguments(*flags)), Device())
    torch.manual_seed(0)
    config = samples.config(initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertForPreTraining(config, attention_name, autocast=precision.autocast, casts_off=precision.casts_off,
                               **choices).train()
    update = optimizer(parameter_groups(model), lr=0.01)
    losses = []
    for step in range(20):
        batch = samples.unpacked_batch(LENGTHS, seed=step)
        if form == "packed":
            batch = samples.packed_batch(batch, ROWS, 26)
        with precision.autocast():
            loss = model(batch)["loss"]
        precision.backward(loss)
        precision.step(update)
        update.zero_grad()
        losses.append(loss.item())
    assert len(set(losses)) == 20
    return torch.tensor(losses)


@pytest.fixture(scope="module", params=["unpacked", "packed"])
def reference(request):
    """The form of the rows, and the losses of plain steps in fp32 and bf16."""
    return request.param, *(losses_of_steps(request.param, flags) for flags in ([], ["--hmp"]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_the_losses_of_plain_steps(reference, variant):
    form, exact, autocast = reference
    assert losses_of_steps(form, [], **VARIANTS[variant]).tolist() == pytest.approx(exact.tolist(), rel=1e-5)
    if VARIANTS[variant].get("attention_name") != "kernels":  # which compute in fp32 only
        error = (losses_of_steps(form, ["--hmp"], **VARIANTS[variant]) - exact).abs().mean()
        assert error <= 3 * (autocast - exact).abs().mean()


class HostFetches(TorchDispatchMode):
    """The operations that make the host wait for a value of the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", [NVLAMB, MultiTensorNVLAMB])
def test_what_cuda_runs_in_a_step_asks_the_device_for_no_value(optimizer):
    model = BertForPreTraining(samples.config(), "plain", checkpoint_activations=True, loss_chunk=5).train()
    update = optimizer(parameter_groups(model), lr=0.01)
    batch = samples.packed_batch(samples.unpacked_batch(LENGTHS), ROWS, 26)
    with HostFetches() as fetches:
        for _ in range(2):
            attention.sequence_bounds(batch["input_mask"], slots=2)
            model(batch)["loss"].backward()
            update.step()
            update.zero_grad()
        assert not fetches.found
        update.gradient_norm.item()
        assert len(fetches.found) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("flags", [["--hmp"], ["--fp16", "--checkpoint_activations"],
                                   ["--hmp", "--use_fused_lamb", "--mlm_loss_chunk=5"],
                                   ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt"],
                                   ["--hmp", "--use_torch_compile", "--cuda_graphs"]])
def test_the_host_waits_for_a_gpu_only_where_it_logs(tmp_path, monkeypatch, flags):
    samples.write_config(tmp_path / "config.json")
    samples.write_dataset(tmp_path / "data")
    train_step = Trainer.train_step

    def guarded(trainer, step):
        mode = "error" if step > 3 else "default"  # what is compiled or measured at first may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return train_step(trainer, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "train_step", guarded)
    run_pretraining.main([
        "--do_train", f"--input_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}", "--skip_checkpoint",
        f"--config_file={tmp_path / 'config.json'}", f"--json_summary={tmp_path / 'log.json'}", "--max_steps=8",
        f"--max_seq_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_seq={samples.PREDICTIONS}",
        "--train_batch_size=8", "--gradient_accumulation_steps=2", "--log_freq=4", *flags])
    assert set(samples.losses(tmp_path / "log.json")) == {4, 8}
