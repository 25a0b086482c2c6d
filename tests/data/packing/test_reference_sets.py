"""Sets as the reference's packer makes them: the last partial file is dropped, and some rows hold no token."""

import json

import h5py
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from common.errors import UserError
from data.dataloader import as_batch
from data.packed_totals import difference_from_metadata, named_totals
from data.packing import scatter_gather
from data.row_checks import read_checked_rows
from data.shards import find_shards, read_rows, write_shard
from modeling import BertForPreTraining
from pack_pretraining_data_pytorch import main as pack
from pytorch_packed_data_checker import main as check
from tests.support import samples, small_run
from tests.support.synthetic import VOCAB_SIZE, write_unpacked_shard
from training.report.inputs import read_packing

EMPTY_ROWS = 2


@pytest.fixture
def folder(tmp_path):
    """A workspace whose data/ is such a set: two shards of 8 rows, two of them empty; the rest is dropped."""
    samples.write_config(tmp_path / "config.json")
    rng = np.random.default_rng(3)
    write_unpacked_shard(tmp_path / "unpacked" / "a_training_0.hdf5", rng.integers(5, 25, 60), 0, 24, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter_gather, "TOKENS_PER_PART", 8 * 24)
        pack(["--input_dir", str(tmp_path / "unpacked"), "--output_dir", str(tmp_path / "data"), "--n_processes", "1",
              "--max_sequence_length", "24", "--max_predictions_per_sequence", "4", "--disable_progress_bar"])
    parts = find_shards(tmp_path / "data")
    assert len(parts) == 5 and parts[-1].rows < 8
    for part in parts[:2]:
        add_empty_row(part)
    parts[-1].path.unlink()
    named = sum(part.rows for part in parts) + EMPTY_ROWS
    write_metadata(tmp_path, {"new_number_of_samples": named, "original_number_of_samples": 60,
                              "avg_seq_per_sample": 60 / named, "compression_ratio": 1 - named / 60,
                              "top_8_strategies": [3, 0, 7]})
    return tmp_path


def add_empty_row(part) -> None:
    rows = {key: np.insert(values, 3, 0, axis=0) for key, values in read_rows(part).items()}
    write_shard(part.path, rows)


def write_metadata(folder, metadata: dict) -> None:
    (folder / "data_metadata.json").write_text(json.dumps(metadata))


def run(folder, *flags) -> int:
    return check(["--input_dir", str(folder / "data"), "--n_processes", "1", "--disable_progress_bar", *flags])


@pytest.mark.parametrize("original", [60, 1], ids=["sequences", "files"])
def test_the_checker_says_what_is_missing_and_accepts_it_when_told(folder, capsys, original):
    """Some versions give the number of files as original_number_of_samples."""
    metadata = json.loads((folder / "data_metadata.json").read_text())
    write_metadata(folder, metadata | {"original_number_of_samples": original})
    held = sum(shard.rows for shard in find_shards(folder / "data"))
    assert run(folder) == 1
    named = named_totals(folder / "data")[0]
    assert (f"names {named} rows, the shards hold {held}: the last {named - held} are missing, as packers of the "
            "reference drop the last, partial file (--allow_missing_tail accepts that)") in capsys.readouterr().out
    flags = ("--allow_missing_tail", "--max_predictions_per_sequence", "4")
    assert run(folder, *flags, "--unpacked_dir", str(folder / "unpacked")) == 0
    printed = capsys.readouterr().out
    assert f"{EMPTY_ROWS} of them without a token" in printed and "all of them in" in printed


def test_a_lost_shard_is_no_missing_tail(folder, capsys):
    find_shards(folder / "data")[2].path.unlink()
    assert run(folder, "--allow_missing_tail") == 1
    assert "as many as a whole shard has: is one lost?" in capsys.readouterr().out
    write_metadata(folder, {"new_number_of_samples": 5, "original_number_of_samples": 9})
    assert run(folder, "--allow_missing_tail") == 1
    assert "are there shards of another set among them?" in capsys.readouterr().out


def test_a_changed_token_is_found_though_the_tail_is_missing(folder, capsys):
    path = find_shards(folder / "data")[2].path
    with h5py.File(path, "r+") as file:
        file["input_ids"][5, 2] += 1
    assert run(folder, "--allow_missing_tail", "--unpacked_dir", str(folder / "unpacked")) == 1
    assert f"{path}: row 5, sequence 1: is not in the unpacked set" in capsys.readouterr().out


def test_more_predictions_than_the_flag_says_are_an_error(folder):
    with pytest.raises(UserError, match="made with 4 predictions a sequence, but --max_predictions_per_sequence is 3"):
        run(folder, "--max_predictions_per_sequence", "3")


def test_the_training_says_what_is_missing_and_passes_over_rows_without_a_token(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    held = sum(shard.rows for shard in find_shards("data"))
    small_run.train(max_steps=4, train_batch_size=16)
    printed = capfd.readouterr()
    printed = printed.out + printed.err
    assert f"the shards hold {held}: the last" in printed and "the training uses those that are there" in printed
    assert printed.count("1 of its 9 rows hold no token and are passed over") == EMPTY_ROWS
    assert all(np.isfinite(loss) for loss in samples.losses(folder / "out/log.json").values())


@pytest.mark.parametrize("packed", [True, False])
def test_a_row_without_a_token_changes_neither_loss_nor_gradients(folder, packed):
    rows = read_rows(find_shards(folder / ("data" if packed else "unpacked"))[0])
    empty = {key: np.insert(values, 1, 0, axis=0) for key, values in rows.items()}
    torch.manual_seed(2)
    model = BertForPreTraining(samples.config()).eval()
    found = []
    for batch in (as_batch(rows), as_batch(empty)):
        model.zero_grad()
        loss = model(batch)["loss"]
        loss.backward()
        found.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
    assert_close(found[0], found[1])


def test_shards_of_hardly_anything_and_empty_rows_with_predictions_are_refused(folder):
    first, second = find_shards(folder / "data")[:2]
    rows = read_rows(first)
    assert len(read_checked_rows(first, VOCAB_SIZE)["input_ids"]) == 9
    rows["masked_lm_positions"][3, 0] = 2
    write_shard(first.path, rows)
    with pytest.raises(UserError, match="row 3 holds no token, but masked_lm_positions"):
        read_checked_rows(first, VOCAB_SIZE)
    rows = read_rows(second)
    write_shard(second.path, {key: np.where(np.arange(9).reshape(9, *[1] * (values.ndim - 1)) < 4, values, 0)
                              for key, values in rows.items()})
    with pytest.raises(UserError, match="6 of its 9 rows hold no token, the first is row 3"):
        read_checked_rows(second, VOCAB_SIZE)


def test_sets_whose_metadata_agree_or_say_nothing_are_not_mentioned(folder):
    assert difference_from_metadata(find_shards(folder / "unpacked")) is None
    write_metadata(folder, {"avg_seq_per_sample": 1.5})
    assert difference_from_metadata(find_shards(folder / "data")) is None
    write_metadata(folder, {"new_number_of_samples": sum(shard.rows for shard in find_shards(folder / "data")),
                            "original_number_of_samples": 1})
    assert difference_from_metadata(find_shards(folder / "data")) is None


@pytest.mark.parametrize(("metadata", "rows"), [
    ({"top_8_strategies": [3, 0]}, []), ({"top_8_strategies": [[20, 4]]}, [[20, 4]]),  # ours before, with lengths
    ({"top_8_strategies": [3], "most_frequent_strategies": [[24]]}, [[24]])])
def test_the_report_reads_the_strategies_of_all_sets(folder, metadata, rows):
    write_metadata(folder, metadata)
    assert read_packing(str(folder / "data"))["most_frequent_strategies"] == rows
