"""Checkpoint files: whole or not there, the newest three, and where a run starts from."""

import pytest
import torch

from checkpoint.folder import read_checkpoint, saved_steps, write_checkpoint
from checkpoint.load import load_model
from checkpoint.resume import Phase, find_resume_point
from common.errors import UserError
from modeling import BertForPreTraining
from tests.support import samples

STATE = {"model": {"weight": torch.arange(6.0)}, "phase": 1, "rows": 77,
         "optimizer": {"state": {}, "param_groups": [{"step": 5, "params": [0]}]}}


def start(folder, phase2=False, **changes):
    warnings = []
    values = {"resume": True, "resume_step": -1, "init_checkpoint": None, **changes}
    return find_resume_point(folder, Phase(2, 12) if phase2 else Phase(), **values, warn=warnings.append), warnings


def rows(found) -> int:
    return found.contents["data"]["rows"]


def test_newest_three_are_kept_and_the_protected_one(tmp_path):
    for step in (3, 6, 9, 12, 15, 100):
        write_checkpoint(tmp_path, step, STATE, protected={6})
    assert saved_steps(tmp_path) == [6, 12, 15, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt_100.pt", "ckpt_12.pt", "ckpt_15.pt", "ckpt_6.pt"]


def test_a_failed_save_leaves_what_was_there(tmp_path):
    write_checkpoint(tmp_path, 3, STATE)
    before = (tmp_path / "ckpt_3.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(tmp_path, 3, {"model": lambda: 0})
    assert (tmp_path / "ckpt_3.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_checkpoint_is_reported_and_passed_over(tmp_path):
    write_checkpoint(tmp_path, 3, STATE)
    (tmp_path / "ckpt_6.pt").write_bytes((tmp_path / "ckpt_3.pt").read_bytes()[:-200])
    found, reports = start(tmp_path)
    assert found.step == 3
    assert len(reports) == 1 and "ckpt_6.pt" in reports[0]


def test_resuming_takes_the_newest_or_the_named_one(tmp_path):
    for step in (3, 6, 10):
        write_checkpoint(tmp_path, step, {**STATE, "rows": step * 8})
    assert (start(tmp_path)[0].step, rows(start(tmp_path)[0])) == (10, 80)
    assert (start(tmp_path, resume_step=6)[0].step, rows(start(tmp_path, resume_step=6)[0])) == (6, 48)
    with pytest.raises(UserError, match="ckpt_7.pt: no such checkpoint"):
        start(tmp_path, resume_step=7)


def test_a_checkpoint_of_the_first_version_keeps_its_position_and_its_skipped_shards(tmp_path):
    """There `rows` stood beside `data`, and `left_out` was the name of the skipped shards."""
    data = {"shards": {"a.hdf5": 6, "b.hdf5": 9}, "left_out": {"b.hdf5": [1, 4]}}
    write_checkpoint(tmp_path, 3, {**STATE, "rows": 24, "data": data})
    assert start(tmp_path)[0].contents["data"] == {"shards": data["shards"], "rows": 24,
                                                   "skipped_shards": {"b.hdf5": [1, 4]}}


def test_existing_checkpoints_are_not_written_over(tmp_path):
    write_checkpoint(tmp_path, 3, STATE)
    with pytest.raises(UserError, match="ckpt_3.pt already"):
        start(tmp_path, resume=False)


def test_phase_two_starts_from_phase_one_and_resumes_itself(tmp_path):
    write_checkpoint(tmp_path, 12, STATE)
    found, _ = start(tmp_path, phase2=True)
    assert found.step == 0 and "data" not in found.contents
    assert found.contents["optimizer"]["param_groups"][0]["step"] == 0
    write_checkpoint(tmp_path, 16, {**STATE, "phase": 2, "rows": 30})
    found, _ = start(tmp_path, phase2=True)
    assert (found.step, rows(found)) == (4, 30)
    assert found.contents["optimizer"]["param_groups"][0]["step"] == 5


def test_phase_two_needs_a_finished_phase_one(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in it"):
        start(tmp_path, phase2=True)
    write_checkpoint(tmp_path, 11, STATE)
    with pytest.raises(UserError, match="below --phase1_end_step 12"):
        start(tmp_path, phase2=True)


def test_phase_one_does_not_resume_phase_two(tmp_path):
    write_checkpoint(tmp_path, 16, {**STATE, "phase": 2})
    with pytest.raises(UserError, match="written in phase 2"):
        start(tmp_path)


def test_init_checkpoint_gives_weights_at_step_zero(tmp_path):
    path = tmp_path / "elsewhere.pt"
    torch.save(STATE, path)
    found, _ = start(tmp_path / "output", init_checkpoint=path, resume=False)
    assert found.step == 0 and set(found.contents) == {"model"}
    found, _ = start(tmp_path / "output", init_checkpoint=path)
    assert found.contents["optimizer"]["param_groups"][0]["step"] == 0


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_files_that_are_no_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "ckpt_1.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="ckpt_1.pt: not a readable checkpoint"):
        read_checkpoint(path)


class Malicious:
    def __reduce__(self):
        return print, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, capsys):
    torch.save({"model": Malicious()}, tmp_path / "ckpt_1.pt")
    with pytest.raises(UserError, match="ckpt_1.pt: not a checkpoint: its model is a __builtin__.print, no dictionary"):
        read_checkpoint(tmp_path / "ckpt_1.pt")
    assert "executed" not in capsys.readouterr().out


def test_weights_of_an_unpadded_vocabulary_and_of_wrappers_load():
    model = BertForPreTraining(samples.config(vocab_size=99))
    unpadded = {f"module.{name}": value[:99] if value.shape[:1] == (104,) else value
                for name, value in BertForPreTraining(samples.config(vocab_size=99)).state_dict().items()}
    load_model(model, {"model": unpadded}, "file")
    weight = model.bert.embeddings.word_embeddings.weight
    assert torch.equal(weight[:99], unpadded["module.bert.embeddings.word_embeddings.weight"])
    assert not weight[99:].any()


def test_weights_that_do_not_fit_are_named():
    model = BertForPreTraining(samples.config(vocab_size=99))
    other = BertForPreTraining(samples.config(vocab_size=99, intermediate_size=48)).state_dict()
    with pytest.raises(UserError, match=r"file: bert.encoder.*intermediate.dense_act.weight has shape \(48, 24\)"):
        load_model(model, {"model": other}, "file")
    other = {name: value for name, value in model.state_dict().items() if "pooler" not in name}
    with pytest.raises(UserError, match="no weight bert.pooler.dense_act.bias in it"):
        load_model(model, {"model": other}, "file")
