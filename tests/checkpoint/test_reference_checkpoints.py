"""Checkpoints of the reference trainer, which hold pickled objects: read without executing them, and continued."""

import argparse
import enum
import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler

import evaluate
import export_to_huggingface
import fill_mask
from checkpoint import optimizer_shards
from checkpoint.folder import newest_readable, read_checkpoint, write_checkpoint
from checkpoint.pickle_reader import Placeholder
from checkpoint.resume import Phase, find_resume_point
from checkpoint.state import TrainingState
from common.bert_config import BertConfig
from common.errors import UserError
from data.row_order import row_ranges
from data.shards import find_shards
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from devices.device import select_device
from devices.options import DeviceOptions, PrecisionOptions
from devices.precision import Precision
from lamb import NVLAMB
from modeling import BertForPreTraining
from optim.build import parameter_groups
from tests.support import samples
from tests.support.ranks import ROOT
from tests.support.small_run import logged_steps, train

FILES = [f"sample_training_{number}.hdf5" for number in (2, 0, 1)]  # in the order of their epoch, of 5, 7 and 13 rows


class HdfRows(Dataset):
    """A set over one file, as the reference trainer has; unpickling one would leave a file EXECUTED."""

    def __init__(self, input_file):
        self.input_file = str(input_file)
        with h5py.File(input_file) as file:
            self.inputs = [np.asarray(file[key][:]) for key in file]

    def __len__(self):
        return len(self.inputs[0])

    def __setstate__(self, state):
        open("EXECUTED", "w").close()


class WorkerSeed:
    def __init__(self, seed):
        self.seed = seed

    def __call__(self, number):
        random.seed(self.seed + number)


class Reduction(enum.Enum):
    MEAN = 1


@pytest.fixture
def workspace(trained_copy, monkeypatch):
    for kind in (HdfRows, WorkerSeed):  # theirs are classes of the program itself
        monkeypatch.setattr(kind, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], kind.__name__, kind, raising=False)
    return trained_copy


def theirs(path, in_use: str | None = FILES[1], **changes) -> dict:
    """One of our checkpoints as the reference trainer saves it while it reads the file `in_use`."""
    ours = read_checkpoint(path)
    rows = HdfRows(f"data/{in_use}") if in_use else None
    loader = DataLoader(rows, sampler=RandomSampler(rows), batch_size=4, worker_init_fn=WorkerSeed(42),
                        drop_last=True, pin_memory=True) if rows else None
    model = BertForPreTraining(BertConfig.from_json_file("config.json"))
    model.load_state_dict(ours["model"])
    masters = [parameter for group in parameter_groups(model) for parameter in group["params"]]
    following = FILES.index(in_use) + 1 if in_use else 1
    return {"model": model.state_dict(), "optimizer": ours["optimizer"], "master params": masters,
            "files": [following, *(f"/data/theirs/{name}" for name in FILES)], "epoch": 0, "data_loader": loader,
            **changes}


def write_theirs(folder, step: int, contents: dict, **options) -> pathlib.Path:
    """Write their checkpoint as the only one of a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    torch.save(contents, folder / f"ckpt_{step}.pt", **options)
    return folder / f"ckpt_{step}.pt"


def restored(folder, **changes) -> tuple:
    """The resume point in a folder, and model, optimizer and stream after it was restored; and the warnings."""
    warnings = []
    given = {"resume": True, "resume_step": -1, "init_checkpoint": None, **changes}
    point = find_resume_point(folder, given.pop("phase", Phase()), warn=warnings.append, **given)
    model = BertForPreTraining(BertConfig.from_json_file("config.json"))
    optimizer = NVLAMB(parameter_groups(model))
    stream = samples.batch_stream(find_shards("data"), 4, seed=5)  # of which the order of three shards is 1, 2, 0
    stream.warn = warnings.append
    precision = Precision(PrecisionOptions(), select_device(DeviceOptions(no_cuda=True)))
    point.restore(TrainingState(model=model, optimizer=optimizer, stream=stream, precision=precision,
                                token_counts=torch.zeros(1)))
    stream.close()
    return point, model, optimizer.state_dict(), stream, warnings


def assert_same(model, optimizer: dict, ours: dict, step: int) -> None:
    """Weights and moments are those of our checkpoint to the bit, and the optimizer counts from `step`."""
    assert all(torch.equal(weight, ours["model"][name]) for name, weight in model.state_dict().items())
    assert [group["step"] for group in optimizer["param_groups"]] == [step, step]
    for number, moments in ours["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], optimizer["state"][number][key]) for key in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("options", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}],
                         ids=["zip", "protocol 4", "before 1.6"])
def test_within_a_phase_step_weights_moments_and_finished_files_are_theirs(workspace, options):
    ours = read_checkpoint("out/ckpt_4.pt")
    write_theirs(workspace / "out", 4, theirs("out/ckpt_4.pt"), **options)
    point, model, optimizer, stream, warnings = restored("out")
    assert point.step == 4
    assert_same(model, optimizer, ours, step=4)
    assert stream.next_row == 5 and warnings == [
        f"out/ckpt_4.pt: its run had finished 1 of 3 shards, which count as used: going on from row 5 of 25, with "
        f"{FILES[1]}"]
    used = [(epoch, stream.pieces[shard].path.name, stop - start) for epoch, shard, start, stop in row_ranges(
        stream.seed, [piece.rows for piece in stream.pieces], 5, 45, stream.skipped_shards)]
    assert used[:2] == [(0, FILES[1], 7), (0, FILES[2], 13)] and {name for _, name, _ in used[2:5]} == set(FILES)
    assert not pathlib.Path("EXECUTED").exists()


def test_the_command_goes_on_from_it_and_then_from_its_own(workspace, capsys):
    """Nothing of an epoch is used twice: the finished file's rows are used again after the other two."""
    write_theirs(workspace / "out", 4, theirs("out/ckpt_4.pt"))
    train(resume_from_checkpoint=True, json_summary="first.json", steps_this_run=5)
    train(resume_from_checkpoint=True, json_summary="second.json")
    assert list(logged_steps(workspace / "first.json")) + list(logged_steps(workspace / "second.json")) == [5, 6]
    assert "going on from row 5 of 25" in capsys.readouterr().err
    assert read_checkpoint("out/ckpt_6.pt")["data"]["rows"] == 5 + 2 * 8


@pytest.mark.parametrize("way", ["resume", "init_checkpoint"])
def test_phase_two_starts_from_it(workspace, way):
    ours = read_checkpoint("out/ckpt_4.pt")
    path = write_theirs(workspace / "out", 4, theirs("out/ckpt_4.pt"))
    where = {"folder": "out"} if way == "resume" else {"folder": "new", "init_checkpoint": str(path)}
    point, model, optimizer, stream, warnings = restored(phase=Phase(2, 4), **where)
    assert (point.step, stream.next_row, warnings) == (0, 0, [])
    assert_same(model, optimizer, ours, step=0)
    flags = {"output_dir": "out"} if way == "resume" else {"output_dir": "new", "init_checkpoint": path}
    train(phase2=True, phase1_end_step=4, max_steps=1, resume_from_checkpoint=True, **flags)
    assert read_checkpoint(f"{flags['output_dir']}/ckpt_5.pt")["phase"] == 2


def test_without_a_loader_the_number_of_cards_tells_which_files_are_finished(workspace):
    write_theirs(workspace / "out", 4, theirs("out/ckpt_4.pt", None, files=[3, *FILES]))
    *_, stream, warnings = restored("out")
    assert stream.next_row == 5 + 7 and warnings[0].endswith("as if its run had had as many cards as this one")


@pytest.mark.parametrize("files, reason", [(None, "it names no files"), ([2, "other.hdf5"] * 2, "it names no files"),
                                           ([2, "other.hdf5", *FILES], "other.hdf5 is not here")])
def test_where_the_finished_files_cannot_be_told_the_run_says_from_which_row_it_goes_on(workspace, files, reason):
    write_theirs(workspace / "out", 4, theirs("out/ckpt_4.pt", None, files=files))
    point, *_, stream, warnings = restored("out")
    assert (point.step, stream.next_row) == (4, 0)
    assert f"which shards its run had finished cannot be told ({reason}): going on from row 0" in warnings[0]


def test_an_optimizer_that_counts_by_weight_or_not_at_all_goes_on_with_the_count_of_the_name(workspace):
    contents, ours = theirs("out/ckpt_4.pt"), read_checkpoint("out/ckpt_4.pt")
    for group in contents["optimizer"]["param_groups"]:
        del group["step"]
    write_theirs(workspace / "none", 4, contents)
    assert_same(*restored("none")[1:3], ours, step=4)
    for moments in contents["optimizer"]["state"].values():
        moments["step"] = torch.tensor([3], dtype=torch.int32)
    write_theirs(workspace / "weights", 4, contents)
    _, model, optimizer, _, warnings = restored("weights")
    assert_same(model, optimizer, ours, step=3)
    assert "its optimizer has made 3 steps, but by its name this is step 4 of the phase" in warnings[0]


def test_weights_of_a_run_in_fp16_are_those_of_its_master_params(workspace):
    ours = read_checkpoint("out/ckpt_4.pt")
    contents = theirs("out/ckpt_4.pt")
    contents["model"] = {name: weight.half().float() for name, weight in contents["model"].items()}
    write_theirs(workspace / "out", 4, contents)
    assert_same(*restored("out")[1:3], ours, step=4)
    contents["master params"] = contents["master params"][::-1]
    write_theirs(workspace / "out", 4, contents)
    _, model, _, _, warnings = restored("out")
    assert "the weights are those of `model`: out/ckpt_4.pt: master params" in warnings[0]
    assert torch.equal(model.cls.predictions.bias, contents["model"]["cls.predictions.bias"])


class Node:
    """Part of an object graph with a cycle, shared parts and tensors."""

    def __init__(self, parent=None):
        self.parent, self.shared = parent, SHARED
        self.children = {depth: Node(self) for depth in range(2)} if parent is None else {}


class NamedWeights(dict):
    pass


SHARED = [torch.zeros(3)]
STRANGE = {
    "namespace": argparse.Namespace(max_steps=7, betas=(0.9, 0.999), path=pathlib.PurePosixPath("/a")),
    "scalar": np.float64(0.25), "count": np.int64(200), "table": np.arange(6, dtype=">i2").reshape(2, 3),
    "enum": Reduction.MEAN, "path": pathlib.PurePosixPath("/results"), "graph": Node(), "function": random.random,
}


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_of_any_class_stay_unread_and_numbers_of_numpy_become_plain(workspace, protocol):
    contents = {**theirs("out/ckpt_4.pt"), **STRANGE, "seed": WorkerSeed(3)}
    contents["optimizer"]["state"][0]["trust_ratio"] = np.float32(0.5)
    path = write_theirs(workspace / "out", 4, contents, pickle_protocol=protocol)
    found = read_checkpoint(path)
    assert found["scalar"] == 0.25 and type(found["count"]) is int and found["count"] == 200
    assert np.array_equal(found["table"], STRANGE["table"]) and found["table"].dtype == STRANGE["table"].dtype
    assert found["optimizer"]["state"][0]["trust_ratio"] == 0.5
    assert isinstance(found["enum"], Placeholder)  # of the class or of getattr, as the release of Python writes it
    assert {name: repr(found[name]) for name in ("namespace", "graph", "seed", "data_loader")} == {
        "namespace": "argparse.Namespace", "graph": f"{__name__}.Node", "seed": "__main__.WorkerSeed",
        "data_loader": "torch.utils.data.dataloader.DataLoader"}
    assert restored("out")[0].step == 4


def test_the_commands_for_a_trained_model_read_them(workspace, capsys):
    contents = {**theirs("out/ckpt_4.pt"), **STRANGE, "step": Node(), "token_counts": np.arange(6)}
    given = [f"--checkpoint={write_theirs(workspace / 'out', 4, contents)}", "--config_file=config.json"]
    evaluate.main([*given, "--eval_dir=held_out", "--no_cuda"])
    assert "MLM loss" in capsys.readouterr().out
    size = samples.TINY["vocab_size"] - len(SPECIAL_TOKENS)
    save_vocabulary(workspace / "vocab.txt", [*SPECIAL_TOKENS, *(f"w{number}" for number in range(size))])
    fill_mask.main([*given, "--vocab_file=vocab.txt", "w1 [MASK] w2"])
    assert "[MASK]" in capsys.readouterr().out
    export_to_huggingface.main([*given, "--vocab_file=vocab.txt", "--output_dir=exported"])
    assert "Step of the phase" not in (workspace / "exported/README.md").read_text()
    weights = read_checkpoint("exported")["model"]
    assert all(torch.equal(weights[name], weight) for name, weight in contents["model"].items())


def test_weights_in_a_dictionary_of_another_class_are_read(workspace):
    contents = theirs("out/ckpt_4.pt")
    write_theirs(workspace / "out", 4, {**contents, "model": NamedWeights(contents["model"])})
    assert_same(*restored("out")[1:3], contents, step=4)


@pytest.mark.parametrize("contents, held", [
    (lambda theirs: {**theirs, "model": argparse.Namespace(**{"\x1b[31m": 1})}, "its model is an argparse.Namespace"),
    (lambda theirs: argparse.Namespace(model=theirs["model"]), "it holds an argparse.Namespace"),
    (lambda theirs: theirs["model"], "it holds no model"),
    (lambda theirs: {**theirs, "optimizer": Node()}, "does not hold param_groups (it is a tests.checkpoint."),
], ids=["model", "all", "bare weights", "optimizer"])
def test_what_cannot_be_read_is_named_with_the_way_out_and_no_older_one_is_taken_for_it(workspace, contents, held):
    torch.save(contents(theirs("out/ckpt_4.pt")), "out/ckpt_6.pt")
    with pytest.raises(UserError) as raised:
        train(resume_from_checkpoint=True)
    assert "out/ckpt_6.pt: " in str(raised.value) and held in str(raised.value)
    assert str(raised.value).isprintable() and "damaged" not in str(raised.value)
    if "param_groups" not in held:
        assert 'torch.save({"model": model.state_dict()}, PATH)' in str(raised.value)
        assert str(raised.value).endswith("; --resume_step 4 goes on from the one before")


def test_a_file_that_cannot_be_opened_is_not_called_damaged_either(workspace):
    (workspace / "out/ckpt_6.pt").unlink()
    (workspace / "out/ckpt_6.pt").symlink_to(workspace / "out/ckpt_6.pt")  # a loop of links: opening it fails
    with pytest.raises(UserError, match="ckpt_6.pt: cannot be read: Too many levels.*--resume_step 4"):
        newest_readable("out", warn=pytest.fail)


# --- ours, there ---

class TheirLAMB(torch.optim.Optimizer):
    """What their NVLAMB and apex's FusedLAMB read from groups and state, with the update of this repository."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6,
                                  "weight_decay": 0.01, "grad_averaging": True, "max_grad_norm": 1.0})

    def step(self):
        for group in self.param_groups:
            assert group["bias_correction"] and group["grad_averaging"] and group["max_grad_norm"] == 1.0
            group["step"] = group["step"] + 1 if "step" in group else 1
            for weight in group["params"]:
                state = self.state[weight]
                assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.shape


def their_phase_two(path) -> tuple:
    """Model and optimizer after their program's start of phase 2 from a checkpoint."""
    checkpoint = torch.load(path, map_location="cpu")
    model = BertForPreTraining(BertConfig.from_json_file("config.json"))
    model.load_state_dict(checkpoint["model"], strict=False)
    optimizer = TheirLAMB(parameter_groups(model))
    for moments in checkpoint["optimizer"]["state"].values():
        moments["step"] = 0
    for group in checkpoint["optimizer"]["param_groups"]:
        group.update(step=0, t_total=5, warmup=0.1, lr=0.004)
    optimizer.load_state_dict(checkpoint["optimizer"])
    return checkpoint, model, optimizer


def test_their_phase_two_starts_from_our_phase_one(workspace):
    ours = read_checkpoint("out/ckpt_6.pt")
    _, model, optimizer = their_phase_two("out/ckpt_6.pt")
    assert_same(model, optimizer.state_dict(), ours, step=0)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]


def test_the_documented_program_writes_sharded_moments_and_master_weights_for_them(workspace):
    """Its weights in the optimizer's order are those that a checkpoint of theirs would hold."""
    ours = read_checkpoint("out/ckpt_6.pt")
    model = BertForPreTraining(BertConfig.from_json_file("config.json"))
    optimizer = NVLAMB(parameter_groups(model))
    optimizer.load_state_dict(ours["optimizer"])
    share, entry = optimizer_shards.write_share(workspace / "zero/.new/rank_0_of_1.pt", optimizer,
                                                ours["optimizer"]["param_groups"])
    optimizer_shards.complete(workspace / "zero/.new", {share: entry}, workspace / "zero/ckpt_6.pt")
    write_checkpoint("zero", 6, {**ours, "optimizer": {"folder": "ckpt_6.optim",
                                                       "param_groups": ours["optimizer"]["param_groups"]}})
    page = (ROOT / "docs/migration.md").read_text()
    program = textwrap.dedent(page.partition("<<'END'\n")[2].partition("    END")[0])
    done = subprocess.run([sys.executable, "-", "zero/ckpt_6.pt", "theirs.pt"], input=program, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stderr
    checkpoint, model, optimizer = their_phase_two("theirs.pt")
    assert_same(model, optimizer.state_dict(), ours, step=0)
    masters = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert all(map(torch.equal, checkpoint["master params"], masters)) and len(masters) == len(
        checkpoint["master params"])
