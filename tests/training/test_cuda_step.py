"""A training step as a GPU runs it, on meta tensors, which have no values: whoever asks for one gets an error."""

from contextlib import nullcontext

import pytest
import torch
import torch.nested._internal.sdpa
from torch.utils._python_dispatch import TorchDispatchMode

import run_pretraining
from devices import device
from devices.device import Device
from tests.support import samples
from training import compilation
from training.trainer import Trainer


class GpuWithoutValues(Device):
    """Takes the paths of CUDA through the model, the optimizer and the loop."""

    is_host = False
    runs_cpu_kernels = False
    attentions = ("varlen", "sdpa")
    compiler = "eager"
    supports_fp16 = True
    has_foreach_kernels = True

    def __init__(self):
        super().__init__("meta")

    def autocast(self, dtype: torch.dtype, enabled: bool = True):
        return nullcontext()  # meta tensors have none


class BlockingCopies(TorchDispatchMode):
    """The copies from the host for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.is_meta and not kwargs.get("non_blocking"):
            self.found += [tensor for tensor in args if not tensor.is_meta]
        return result


@pytest.fixture
def train(tmp_path, monkeypatch):
    """A function that takes four training steps on meta tensors: the trainer, and the copies that block."""
    samples.write_config(tmp_path / "config.json")
    samples.write_dataset(tmp_path / "data")
    monkeypatch.setattr(device, "select_device", lambda options, local_rank: GpuWithoutValues())
    let_flash_attention_take_meta_tensors(monkeypatch)
    found = []

    def take_steps(trainer) -> dict:
        with BlockingCopies() as copies:
            for step in range(1, 5):
                trainer.train_step(step)
        found.extend((trainer, copies.found))
        return {"final_loss": None}

    monkeypatch.setattr(Trainer, "train", take_steps)

    def train(*flags):
        run_pretraining.main([
            "--do_train", f"--input_dir={tmp_path / 'data'}", f"--output_dir={tmp_path / 'out'}", "--skip_checkpoint",
            f"--config_file={tmp_path / 'config.json'}", f"--json_summary={tmp_path / 'log.json'}", "--max_steps=8",
            f"--max_seq_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_seq={samples.PREDICTIONS}",
            "--train_batch_size=8", "--gradient_accumulation_steps=2", "--peak_tflops=1", *flags])
        return found

    yield train
    torch.compiler.reset()


def let_flash_attention_take_meta_tensors(monkeypatch) -> None:
    """Lead nested tensors to the kernel that a GPU takes: PyTorch would choose by the device, and cast for autocast."""
    sdpa = torch.nested._internal.sdpa
    monkeypatch.setattr(sdpa, "can_use_flash_attention", lambda *_, **__: True)
    monkeypatch.setattr(sdpa, "_is_computing_meta_flops", lambda query: False, raising=False)
    monkeypatch.setattr(sdpa, "_autocast", lambda *inputs: inputs, raising=False)


@pytest.mark.parametrize("flags", [
    ["--hmp", "--attention=varlen"],
    ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt", "--attention=varlen"],
    ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt", "--attention=sdpa"],
    ["--fp16", "--attention=sdpa", "--checkpoint_activations"],
    ["--hmp", "--attention=varlen", "--mlm_loss_chunk=5", "--use_fused_lamb"],
    ["--hmp", "--attention=varlen", "--normalize_loss=tokens"],
])
def test_the_host_waits_for_nothing_in_a_step(train, flags):
    trainer, blocking = train(*flags)
    assert not blocking
    assert trainer.optimizer.gradient_norm.is_meta


def test_recorded_graphs_hear_of_each_pass_and_never_own_the_gradients(train, monkeypatch):
    begun = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    gradients = []
    prepare_replay = compilation.prepare_replay

    def prepared(model):
        prepare_replay(model)
        gradients.extend(parameter.grad for parameter in model.parameters())

    monkeypatch.setattr(compilation, "prepare_replay", prepared)
    trainer, _ = train("--hmp", "--attention=varlen", "--use_torch_compile", "--cuda_graphs")
    assert len(begun) == 4 * 2
    assert all(parameter.grad is gradient
               for parameter, gradient in zip(trainer.model.parameters(), gradients, strict=True))
    with torch.no_grad():
        trainer.model.eval().logits(trainer.first_batch())
    assert len(begun) == 4 * 2 + 1, "an evaluation, too"
