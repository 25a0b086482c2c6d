"""Masks made while reading: the rule, and that they depend on seed, epoch and row alone."""

import json
import shutil

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import create_pretraining_data
import evaluate
import pack_pretraining_data_pytorch
import pytorch_packed_data_checker
import run_pretraining
from common.errors import UserError
from data import masking, shards
from data.dataloader import BatchStream, as_batch
from data.row_checks import read_checked_rows
from data.shards import MASK_KEYS, columns, find_shards, read_header, read_rows
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from tests.support import ranks, samples, synthetic

LENGTH, PREDICTIONS = samples.SEQUENCE_LENGTH, samples.PREDICTIONS
SPECIAL = [synthetic.CLS, synthetic.SEP]


def shown_rows(lengths, seed=0, sequence_length=128) -> dict:
    """Rows without masks."""
    return synthetic.without_masks(synthetic.unpacked_rows(np.asarray(lengths), np.random.default_rng(seed),
                                                           sequence_length, 20))


def masks(rows, epoch=0, predictions=20, slots=20) -> dict:
    numbers = np.arange(len(rows["input_ids"]))
    return masking.masked(rows, synthetic.rule(predictions), slots, masking.row_keys(1, epoch, 0, numbers))


def masked_tokens(rows, masks) -> tuple[np.ndarray, np.ndarray]:
    """What is shown in the place of the masked tokens, and what stood there."""
    row, slot = np.nonzero(masks["masked_lm_positions"])
    place = row, masks["masked_lm_positions"][row, slot]
    assert (masks["masked_lm_ids"][row, slot] == rows["input_ids"][place]).all()
    return masks["input_ids"][place], rows["input_ids"][place]


def test_15_percent_are_predicted_of_which_80_are_hidden_10_replaced_10_kept():
    rows = shown_rows(np.full(8000, 128))
    found = masks(rows)
    shown, original = masked_tokens(rows, found)
    assert len(shown) == 8000 * round(128 * 0.15)
    hidden, kept = shown == synthetic.MASK, shown == original
    replaced = shown[~hidden & ~kept]
    assert abs(hidden.mean() - 0.8) < 0.005
    assert abs(kept.mean() - 0.1) < 0.004
    assert not np.isin(replaced, [0, 100, *SPECIAL, synthetic.MASK]).any()
    words = np.bincount(replaced // 3000, minlength=11)[:10]  # 10 equal parts of the vocabulary, and a rest
    assert (abs(words / words.mean() - 1) < 0.12).all()


def test_numbers_of_predictions_by_hand():
    lengths = np.array([0, 3, 4, 5, 13, 20, 100, 128, 512])  # 3: no token but [CLS] and two [SEP]
    assert synthetic.rule().predictions(lengths).tolist() == [0, 0, 1, 1, 2, 3, 15, 19, 20]


def test_every_word_of_a_row_is_as_likely_to_be_predicted():
    rows = shown_rows([40])
    counts = np.zeros(128)
    for epoch in range(3000):
        counts[masks(rows, epoch)["masked_lm_positions"][0, :6]] += 1
    words = np.isin(rows["input_ids"][0], [*SPECIAL, 0], invert=True)
    assert not counts[~words].any()
    expected = 3000 * 6 / words.sum()
    assert (abs(counts[words] - expected) < 5 * expected ** 0.5).all()


@given(st.lists(st.lists(st.integers(5, 12), min_size=1, max_size=3), min_size=1, max_size=6), st.integers(1, 9),
       st.integers(0, 99))
@settings(deadline=None)
def test_each_sequence_of_a_packed_row_is_masked_by_the_rule(lengths, predictions, epoch):
    """Sequence by sequence: as many tokens as its own length asks for, none of them [CLS] or [SEP]; the rest stays."""
    flat = [length for row in lengths for length in row]
    unpacked = as_batch(shown_rows(flat, sequence_length=12) | masks(shown_rows(flat, sequence_length=12)))
    members = np.split(np.arange(len(flat)), np.cumsum([len(row) for row in lengths])[:-1])
    batch = samples.packed_batch(unpacked, [list(row) for row in members], 36)
    rows = {key: batch[key].numpy() for key in ("input_mask", "input_ids")}
    rule = synthetic.rule(predictions)
    found = masks(rows, epoch, predictions, slots=3 * predictions)
    positions = found["masked_lm_positions"]
    for row, members in enumerate(lengths):
        used = positions[row][positions[row] > 0]
        assert (np.diff(used) > 0).all() and not positions[row, len(used):].any()
        assert not found["masked_lm_ids"][row, len(used):].any()
        numbers = np.bincount(rows["input_mask"][row, used], minlength=len(members) + 1)[1:]
        assert numbers.tolist() == rule.predictions(np.array(members)).tolist()
        assert not np.isin(rows["input_ids"][row, used], SPECIAL).any()
        others = np.setdiff1d(np.arange(36), used)
        assert (found["input_ids"][row, others] == rows["input_ids"][row, others]).all()


def test_masks_differ_between_epochs_rows_and_seeds_and_are_else_the_same():
    rows = {key: np.repeat(values, 30, axis=0) for key, values in shown_rows([128]).items()}
    first, again, later = masks(rows), masks(rows), masks(rows, epoch=1)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert len(np.unique(np.concatenate([first["masked_lm_positions"], later["masked_lm_positions"]]), axis=0)) == 60
    some = {key: values[[7, 3]] for key, values in rows.items()}
    keys = masking.row_keys(1, 0, 0, np.array([7, 3]))
    assert np.array_equal(masking.masked(some, synthetic.rule(), 20, keys)["masked_lm_ids"],
                          first["masked_lm_ids"][[7, 3]])
    assert (masking.row_keys(2, 0, 0, np.arange(9)) != masking.row_keys(1, 0, 0, np.arange(9))).all()


# --- through files ---

@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a config and shards without masks, for training and held out."""
    monkeypatch.chdir(tmp_path)
    samples.write_config(tmp_path / "config.json")
    samples.write_dataset(tmp_path / "data", (23, 17, 9), write=synthetic.write_shard_without_masks)
    samples.write_dataset(tmp_path / "held_out", (6, 4), "test", write=synthetic.write_shard_without_masks)
    return tmp_path


def stream(rank=0, world_size=1, first_row=0, size=3) -> BatchStream:
    return samples.batch_stream(find_shards("data"), size, 1, rank, world_size, first_row)


def rows_of(*batches) -> list[tuple]:
    """The rows of batches, one behind the other, each as plain numbers."""
    return [tuple(tuple(batch[key][row].tolist()) for key in sorted(batch))
            for batch in batches for row in range(len(batch["input_ids"]))]


def taken(source, count: int) -> list:
    batches = [next(source) for _ in range(count)]
    source.close()
    return batches


def test_masks_of_a_row_do_not_depend_on_ranks_batches_or_resuming(workspace):
    whole = rows_of(*taken(stream(), 40))  # 120 rows, more than two epochs of 49
    parts = zip(*(taken(stream(rank, 4), 10) for rank in range(4)), strict=True)
    assert rows_of(*(batch for part in parts for batch in part)) == whole
    assert rows_of(*taken(stream(first_row=60), 20)) == whole[60:]
    assert rows_of(*taken(stream(size=5), 24)) == whole
    assert len(set(whole)) > 110  # the shortest rows can be masked in two ways only


def test_epochs_show_the_same_tokens_under_other_masks(workspace):
    def restored(batch) -> list:
        rows = {key: batch[key].numpy() for key in batch}
        return sorted(map(tuple, synthetic.without_masks(rows)["input_ids"].tolist()))

    first, second = taken(stream(size=49), 2)
    assert restored(first) == restored(second)
    assert sorted(rows_of(first)) != sorted(rows_of(second))


def train(output: str, **changes) -> dict:
    run_pretraining.main(ranks.flags(1, output, **{"skip_checkpoint": None, "max_steps": 8, **changes}))
    return torch.load(f"{output}/ckpt_{changes.get('steps_this_run', 8)}.pt", weights_only=True)["model"]


@pytest.mark.parametrize("packed", [False, True])
def test_two_runs_stopped_and_resumed_equal_an_undisturbed_one(workspace, packed):
    """Over two epochs, bit for bit."""
    if packed:
        pack()
        shutil.rmtree("data")
        shutil.move("packed", "data")
    undisturbed = train("whole")
    for last in (3, 6, 8):
        resumed = train("parts", steps_this_run=last, resume_from_checkpoint=True)
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert samples.losses(workspace / "parts.json") == samples.losses(workspace / "whole.json")


def test_held_out_shards_have_the_same_masks_each_time(workspace, capsys):
    command = ["--config_file=config.json", "--eval_dir=held_out", "--json", "--no_cuda"]
    figures = []
    for batch_size in (3, 10):
        evaluate.main([*command, f"--batch_size={batch_size}"])
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
    assert figures[0]["sequences"] == 10 and figures[0]["masked_tokens"] > 10


def pack(*more) -> None:
    pack_pretraining_data_pytorch.main([
        "--input_dir=data", "--output_dir=packed", f"--max_sequence_length={LENGTH}",
        f"--max_predictions_per_sequence={PREDICTIONS}", "--n_processes=1", "--disable_progress_bar", *more])


def check() -> int:
    return pytorch_packed_data_checker.main(["--input_dir=packed", "--unpacked_dir=data", "--n_processes=1",
                                             "--disable_progress_bar"])


def test_packing_keeps_every_sequence_and_the_rule(workspace, capsys):
    pack()
    assert check() == 0 and "49 sequences, the same as in data: no fault" in capsys.readouterr().out
    unpacked, packed = find_shards("data")[0], find_shards("packed")[0]
    assert packed.rule == unpacked.rule and packed.prediction_slots == PREDICTIONS + 3
    assert not set(MASK_KEYS) & set(read_rows(packed))
    with h5py.File(packed.path, "a") as file:
        file.attrs["masked_lm_prob"] = 0.2
    assert check() == 1 and "without masks (20% of the tokens" in capsys.readouterr().out
    with h5py.File(packed.path, "a") as file:
        file["input_ids"][0, 1] += 1
        file.attrs["masked_lm_prob"] = 0.15
    assert check() == 1
    with h5py.File(packed.path, "a") as file:
        file.attrs["prediction_slots"] = 1
    assert check() == 1 and "has more tokens to predict than room for them" in capsys.readouterr().out


def test_packing_refuses_rows_without_room_for_the_masks_to_come(workspace):
    with pytest.raises(UserError, match="a row of up to 2 sequences can have 4 masked tokens, but has room for 3"):
        pack("--max_predictions_per_sequence=1", "--max_sequences_per_pack=2")


def test_packing_refuses_more_sequences_a_row_than_can_be_masked_later(workspace):
    with pytest.raises(UserError, match="--max_sequences_per_pack 255: .* can hold 254 sequences at most"):
        pack("--max_predictions_per_sequence=4", "--max_sequences_per_pack=255", "--packing_method=lpfhp")


def damage(change) -> None:
    with h5py.File("data/sample_training_1.hdf5", "a") as file:
        change(file)


@pytest.mark.parametrize("change, said", [
    (lambda file: file.attrs.pop("special_ids"), "sample_training_1.hdf5: not a readable HDF5 file"),
    (lambda file: file.attrs.create("special_ids", [1, 2]), "sample_training_1.hdf5: .*not a valid masking rule"),
    (lambda file: file.attrs.pop("prediction_slots"), "sample_training_1.hdf5: no data set masked_lm_positions"),
    (lambda file: file.attrs.modify("masked_lm_prob", 0.5), r"sample_training_1.hdf5 is .* \(50% of the tokens"),
    (lambda file: file.attrs.modify("vocab_size", 40_000), "in a vocabulary of 40000")])
def test_shards_that_cannot_be_masked_are_refused(workspace, change, said):
    damage(change)
    with pytest.raises(UserError, match=said):
        train("out")
    assert not (workspace / "out").exists()


def test_a_vocabulary_larger_than_the_models_is_refused(workspace):
    samples.write_config(workspace / "config.json", vocab_size=30_000)
    with pytest.raises(UserError, match="input_ids|made with a vocabulary of 30522, but the config's has 30000"):
        train("out")


# --- made from text ---

WORDS = ["the", "sea", "is", "deep", "and", "old", "ships", "sail", "far", "out"]


def create(text, output, *flags) -> shards.Shard:
    save_vocabulary("vocab.txt", [*SPECIAL_TOKENS, *WORDS])
    create_pretraining_data.main([f"--input_file={text}", f"--output_file={output}", "--vocab_file=vocab.txt",
                                  "--max_seq_length=128", *flags])
    return read_header(output)


def test_samples_are_stored_once_in_a_fifth_of_the_space(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    choose = np.random.default_rng(3).choice
    documents = ["\n".join(" ".join(choose(WORDS, 20)) for _ in range(30)) for _ in range(60)]
    (tmp_path / "text.txt").write_text("\n\n".join(documents))
    fixed = create("text.txt", tmp_path / "fixed_training.hdf5")
    dynamic = create("text.txt", tmp_path / "dynamic_training.hdf5", "--dynamic_masking")
    assert fixed.rule is None and abs(fixed.rows / dynamic.rows - 5) < 0.3
    assert dynamic.path.stat().st_size < 0.2 * fixed.path.stat().st_size
    assert dynamic.rule == masking.MaskingRule(0.15, 20, 15, (0, 1, 2, 3, 4))
    rows = read_checked_rows(dynamic, 15)
    assert set(rows) == set(columns(packed=False)) - set(MASK_KEYS)
    assert not (rows["input_ids"] == 4).any()
    twice = create("text.txt", tmp_path / "twice_training.hdf5", "--dynamic_masking", "--dupe_factor=2")
    assert abs(twice.rows / dynamic.rows - 2) < 0.2
