"""Checkpoints of Gaudi's modes, on the stand-in for its software: each mode reads what another wrote, and so does stock
PyTorch."""

import os
import shutil
import zipfile

import pytest
import torch

import evaluate
from checkpoint.file import read_file, write_file
from common.errors import UserError
from tests.support import gaudi, samples, small_run

MODES = {"lazy": {"use_lazy_mode": "True"}, "eager": {"use_lazy_mode": "False"},
         "compiled": {"use_torch_compile": True}}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with config and data, and a run of 2 steps in each mode: its first checkpoint in MODE/, its losses in
    MODE.json."""
    folder = small_run.write_workspace(tmp_path_factory.mktemp("modes"))
    samples.write_config(folder / "config.json", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    for mode in MODES:
        train(folder, mode, f"{mode}.json", mode=mode)
        (folder / mode / "ckpt_2.pt").unlink()
    return folder


def train(folder, output: str, log: str, mode: str, **changes) -> list[dict]:
    """Train 2 steps in a mode; returns the record of the stand-in."""
    flags = small_run.flags(output_dir=output, json_summary=log, max_steps=2, num_steps_per_checkpoint=1, no_cuda=None,
                            use_habana=True, **MODES[mode], **changes)
    record = folder / f"{output}.record"
    done = gaudi.run([gaudi.ROOT / "run_pretraining.py", *flags], cwd=folder, record=record)
    assert done.returncode == 0, done.stderr[-2000:]
    return gaudi.calls(record)


@pytest.mark.parametrize("writer", MODES)
def test_stock_pytorch_and_the_other_commands_read_a_checkpoint_of_each_mode(workspace, writer, capsys):
    path = workspace / writer / "ckpt_1.pt"
    weights = torch.load(path, weights_only=True)["model"]
    tied = [weights[name] for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")]
    assert tied[0].data_ptr() == tied[1].data_ptr(), "written once"
    evaluate.main([f"--checkpoint={path}", f"--config_file={workspace / 'config.json'}", "--no_cuda",
                   f"--eval_dir={workspace / 'held_out'}"])
    assert "MLM loss" in capsys.readouterr().out


@pytest.mark.parametrize("reader", MODES)
@pytest.mark.parametrize("writer", MODES)
def test_each_mode_continues_from_a_checkpoint_of_each(workspace, tmp_path, writer, reader):
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    calls = train(tmp_path, writer, "resumed.json", mode=reader, resume_from_checkpoint=True)
    expected, found = (samples.losses(tmp_path / name) for name in (f"{writer}.json", "resumed.json"))
    assert list(found) == [2] and found[2] == pytest.approx(expected[2], abs=1e-4)
    assert expected[1] - expected[2] > 1e-3, "a checkpoint that was not read would show"
    assert {"torch.save", "torch.load"}.isdisjoint(call["call"] for call in calls), "the plugin's own functions"


SAVE_IN_LAZY_MODE = """
import sys, habana_frameworks.torch.core
import torch
from checkpoint import file
contents = file.read_file(sys.argv[1])
torch.save(contents, sys.argv[2])  # as other programs do
file.inspect.unwrap, file.PICKLE_PROTOCOL = lambda function: function, 4  # as earlier versions of this repository did
file.write_file(sys.argv[3], contents)
"""


def test_files_of_the_plugins_own_save_are_read(workspace, tmp_path):
    """Pickle protocol 4, tied weights twice; with a checksum where an earlier version of this repository wrote it."""
    path, unsealed, sealed = workspace / "lazy" / "ckpt_1.pt", tmp_path / "unsealed.pt", tmp_path / "sealed.pt"
    done = gaudi.run(["-c", SAVE_IN_LAZY_MODE, path, unsealed, sealed], PT_HPU_LAZY_MODE="1",
                     PYTHONPATH=f"{gaudi.STANDIN}{os.pathsep}{gaudi.ROOT}")
    assert done.returncode == 0, done.stderr
    expected = read_file(path)
    for target in (unsealed, sealed):
        assert pickle_protocol(target) == 4 and pickle_protocol(path) == 2, "else this shows nothing"
        with pytest.raises(Exception, match="Unsupported operand 149"):
            torch.load(target, weights_only=True)
        found = read_file(target)
        assert found.keys() == expected.keys() and found["config"] == expected["config"]
        for part in ("model", "optimizer"):
            for one, other in zip(tensors(found[part]), tensors(expected[part]), strict=True):
                assert torch.equal(one, other)
    damaged = bytearray(sealed.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    sealed.write_bytes(damaged)
    with pytest.raises(UserError, match="its checksum does not match"):
        read_file(sealed)


def pickle_protocol(path) -> int:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        return archive.read(name)[1]


def tensors(value) -> list[torch.Tensor]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [value] if isinstance(value, torch.Tensor) else [tensor for item in values for tensor in tensors(item)]


class Program:
    """An object that runs a command when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_in_a_file_is_executed_whatever_its_protocol(tmp_path, protocol):
    path, marker = tmp_path / "ckpt_1.pt", tmp_path / "executed"
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    torch.save({"model": {"weight": weight}}, path, pickle_protocol=protocol)
    assert torch.equal(read_file(path)["model"]["weight"], weight)
    torch.save({"model": {"weight": weight, "program": Program(marker)}}, path, pickle_protocol=protocol)
    model = read_file(path)["model"]
    assert torch.equal(model["weight"], weight) and repr(model["program"]).endswith(".open")
    assert not marker.exists()


def test_a_torchscript_program_is_refused(tmp_path):
    path = tmp_path / "ckpt_1.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match="ckpt_1.pt: cannot be read: it is a TorchScript program"):
        read_file(path)


def test_a_value_that_occurs_twice_is_written_once(tmp_path):
    weight = torch.randn(100_000)
    write_file(tmp_path / "once.pt", {"model": {"a": weight}})
    write_file(tmp_path / "twice.pt", {"model": {"a": weight, "b": weight}})
    once, twice = ((tmp_path / name).stat().st_size for name in ("once.pt", "twice.pt"))
    assert twice - once < 1000
