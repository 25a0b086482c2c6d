"""Checkpoints that were cut, rotted, half-written, hostile, or made by other code."""

import pickle
from pathlib import Path

import pytest
import torch

from checkpoint import optimizer_shards
from checkpoint.folder import checkpoint_path, newest_readable, read_checkpoint, saved_steps, write_checkpoint
from common.errors import UserError
from lamb import NVLAMB
from modeling import BertForPreTraining
from tests.support import samples
from tests.support.small_run import files_of_at_most, train


def newest(folder) -> tuple[int, list[str]]:
    """The step of the checkpoint that a run would continue from, and what it would report."""
    reports = []
    return newest_readable(folder, reports.append)[0], reports


def test_a_checkpoint_cut_at_any_tenth_is_passed_over_and_named(trained_copy):
    path = trained_copy / "out/ckpt_6.pt"
    whole = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(whole[:len(whole) * tenth // 10])
        step, reports = newest(trained_copy / "out")
        assert step == 4, tenth
        assert len(reports) == 1 and "skipped a damaged checkpoint" in reports[0] and "ckpt_6.pt" in reports[0]


def test_a_single_flipped_byte_anywhere_is_found(trained_copy):
    """At the ends, where the seal and the archive's directory are, and every so often between."""
    path = trained_copy / "out/ckpt_6.pt"
    whole = path.read_bytes()
    places = {*range(9), *range(0, len(whole), len(whole) // 20), *range(len(whole) - 100, len(whole))}
    for place in sorted(places):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ 0x10]))
        step, reports = newest(trained_copy / "out")
        assert step == 4 and "ckpt_6.pt" in reports[0], place
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(whole[place:place + 1])
    assert newest(trained_copy / "out") == (6, [])


def write_sharded(folder, step: int) -> None:
    """A checkpoint whose optimizer state is in a folder beside it, as one rank of several would write it."""
    parameter = torch.nn.Parameter(torch.ones(40, 3))
    optimizer = NVLAMB([parameter])
    parameter.grad = torch.full_like(parameter, float(step))
    optimizer.step()
    path, groups = checkpoint_path(folder, step), optimizer_shards.numbered_groups(optimizer)
    name, entry = optimizer_shards.write_share(folder / ".new/rank_0_of_1.pt", optimizer, groups)
    optimizer_shards.complete(folder / ".new", {name: entry}, path)
    write_checkpoint(folder, step, {"model": {"weight": parameter.detach()},
                                   "optimizer": {"folder": f"ckpt_{step}.optim", "param_groups": groups}})


def test_damage_to_sharded_optimizer_state_is_found_too(tmp_path):
    for step in (4, 6):
        write_sharded(tmp_path, step)
    assert newest(tmp_path) == (6, [])
    for name in ("rank_0_of_1.pt", "index.json"):
        path = tmp_path / "ckpt_6.optim" / name
        whole = path.read_bytes()
        flipped = bytes([whole[len(whole) // 2] ^ 0x10])
        for damaged in (whole[:-3], whole[:len(whole) // 2] + flipped + whole[len(whole) // 2 + 1:], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            step, reports = newest(tmp_path)
            assert step == 4 and len(reports) == 1 and name in reports[0]
        path.write_bytes(whole)


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one_and_says_so(trained_copy, capsys):
    whole = (trained_copy / "out/ckpt_6.pt").read_bytes()
    (trained_copy / "out/ckpt_6.pt").write_bytes(whole[:len(whole) // 2])
    (trained_copy / "out/.ckpt_8.pt.99.tmp").write_bytes(whole[:100])  # of a run that was killed
    train(resume_from_checkpoint=True)
    assert "skipped a damaged checkpoint: out/ckpt_6.pt" in capsys.readouterr().err
    assert (trained_copy / "out/ckpt_6.pt").read_bytes() == whole
    assert sorted(path.name for path in (trained_copy / "out").glob("*ckpt*")) == ["ckpt_4.pt", "ckpt_6.pt"]


def test_where_no_checkpoint_can_be_read_nothing_is_started_anew(trained_copy):
    for name in ("ckpt_4.pt", "ckpt_6.pt"):
        (trained_copy / "out" / name).write_bytes(b"PK")
    with pytest.raises(UserError, match="none of its 2 checkpoints can be read; move them away to start again"):
        train(resume_from_checkpoint=True)


def test_no_checkpoint_goes_before_the_new_one_is_safe(tmp_path):
    state = {"model": {"weight": torch.zeros(10_000)}}
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step, state)
    with files_of_at_most(20_000), pytest.raises(OSError, match="too large"):
        write_checkpoint(tmp_path, 4, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_1.pt", "ckpt_2.pt", "ckpt_3.pt"]
    write_checkpoint(tmp_path, 4, state)
    assert saved_steps(tmp_path) == [2, 3, 4]


class Payload:
    """What a malicious file makes of itself where its pickle is executed: a file named EXECUTED."""

    def __reduce__(self):
        return open, ("EXECUTED", "w")


def test_the_payload_works_where_a_pickle_is_executed(trained_copy):
    pickle.loads(pickle.dumps(Payload()))
    assert (trained_copy / "EXECUTED").exists()


def write_plain_pickle(value, path) -> None:
    path.write_bytes(pickle.dumps(value))


def write_legacy_file(value, path) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("write", [torch.save, write_legacy_file, write_plain_pickle])
def test_a_malicious_checkpoint_runs_nothing(trained_copy, write):
    (trained_copy / "bert").mkdir()
    (trained_copy / "bert/config.json").write_text("{}")
    for path, flags in ((trained_copy / "out/ckpt_9.pt", {"resume_from_checkpoint": True, "resume_step": 9}),
                        (trained_copy / "start.pt", {"init_checkpoint": "start.pt", "output_dir": "new"}),
                        (trained_copy / "bert/pytorch_model.bin", {"init_checkpoint": "bert", "output_dir": "new"})):
        write({"model": {"weight": Payload()}}, path)
        with pytest.raises(UserError, match=f"{path.name}: |bert: no weight"):
            train(**flags)
    assert not (trained_copy / "EXECUTED").exists()


def foreign(path) -> dict:
    """Our checkpoint as the code that NVLAMB comes from would have saved it."""
    ours = read_checkpoint(path)
    groups = [{**group, "lr": 0.006, "bias_correction": True, "grad_averaging": True, "max_grad_norm": 1.0,
               "step": 7038} for group in ours["optimizer"]["param_groups"]]
    weights = {f"module.{name}": value for name, value in ours["model"].items()}
    unpadded = {name: value[:30522] if len(value) == 30528 else value for name, value in weights.items()}
    return {"model": unpadded, "optimizer": {"state": ours["optimizer"]["state"], "param_groups": groups},
            "master params": list(weights.values())[:2], "files": [3, "part_0.hdf5"], "epoch": 4, "data_loader": None,
            "scaler": {"scale": 65536.0}}


def losses_from(init_checkpoint: str, **changes) -> list[float]:
    folder = f"from_{init_checkpoint.replace('/', '_')}_{len(changes)}"
    train(init_checkpoint=init_checkpoint, output_dir=folder, json_summary=f"{folder}.json", max_steps=4,
          skip_checkpoint=True, **changes)
    return list(samples.losses(Path(f"{folder}.json")).values())


def test_init_checkpoint_takes_weights_and_moments_of_other_code(trained_copy):
    """Unpadded, named by DDP, beside keys that mean nothing here: trained on, it is our own checkpoint.

    Its rows of the padding are zeros, ours are trained: no label is one of them, so losses differ in the last bits.
    """
    torch.save(foreign(trained_copy / "out/ckpt_6.pt"), trained_copy / "foreign.pt")
    own, others = losses_from("out/ckpt_6.pt"), losses_from("foreign.pt")
    assert others == pytest.approx(own, rel=1e-4)
    with_moments = losses_from("foreign.pt", resume_from_checkpoint=True)
    assert with_moments == pytest.approx(losses_from("out/ckpt_6.pt", resume_from_checkpoint=True), rel=1e-4)
    assert with_moments[0] == others[0] and with_moments[2:] != pytest.approx(others[2:], rel=1e-4)


def test_moments_of_other_code_go_to_the_parameters_that_they_are_of():
    """NVLAMB numbers parameters in two groups, biases and LayerNorms in the second, each in the order of the model."""
    names = [name for name, _ in BertForPreTraining(samples.config(num_hidden_layers=1)).named_parameters()]
    assert names[:5] == [f"bert.embeddings.{part}" for part in (
        "word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight", "LayerNorm.weight",
        "LayerNorm.bias")]
    assert names[21:] == ["bert.pooler.dense_act.weight", "bert.pooler.dense_act.bias", "cls.predictions.bias",
                          "cls.predictions.transform.dense_act.weight", "cls.predictions.transform.dense_act.bias",
                          "cls.predictions.transform.LayerNorm.weight", "cls.predictions.transform.LayerNorm.bias",
                          "cls.seq_relationship.weight", "cls.seq_relationship.bias"]
