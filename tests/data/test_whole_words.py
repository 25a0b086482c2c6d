"""Whole-word masks: no word is cut, none is left out that would fit, and the statistics stay."""

from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import run_pretraining
from common.errors import UserError
from data import masking
from data.shards import find_shards, write_shard
from tests.support import ranks, samples, synthetic

VOCABULARY, SPECIAL = 40, (0, 1, 2, 3, 4)
CLS, SEP, MASK = SPECIAL[2:]
PIECES = np.arange(VOCABULARY) >= 20  # ids of pieces that continue a word


def rule_of(share=0.15, most=20, whole=True) -> masking.MaskingRule:
    return masking.MaskingRule(share, most, VOCABULARY, SPECIAL, whole, masking.packed_bits(PIECES))


def rows_of(sequences: list[list[list[int]]], length: int) -> dict[str, np.ndarray]:
    """Rows of several sequences each, [CLS] words [SEP]; a sequence is given by the sizes of its words.

    A size below 0 stands for a word whose beginning is cut off: it begins with a piece.
    """
    rng = np.random.default_rng(7)
    rows = {key: np.zeros((len(sequences), length), np.int32) for key in ("input_ids", "input_mask")}
    for number, row in enumerate(sequences):
        place = 0
        for index, sizes in enumerate(row, start=1):
            ids = [CLS]
            for at, size in enumerate(sizes):
                first = rng.integers(20, 40) if size < 0 and at == 0 else rng.integers(5, 20)
                ids += [first, *rng.integers(20, 40, abs(size) - 1)]
            ids.append(SEP)
            rows["input_ids"][number, place:place + len(ids)] = ids
            rows["input_mask"][number, place:place + len(ids)] = index
            place += len(ids)
    return rows


def words_in(ids: np.ndarray) -> list[list[int]]:
    """The places of the pieces of each word of a row: a plain loop."""
    words: list[list[int]] = []
    for place, token in enumerate(ids):
        if token in (0, CLS, SEP):
            continue
        if PIECES[token] and words and words[-1][-1] == place - 1:
            words[-1].append(place)
        else:
            words.append([place])
    return words


word_sizes = st.lists(st.sampled_from([1, 1, 1, 1, 2, 2, 3, 5, -1, -2]), min_size=1, max_size=14)


@given(st.lists(st.lists(word_sizes, min_size=1, max_size=3), min_size=1, max_size=5), st.floats(0.05, 1.0),
       st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_masks_never_cut_a_word_and_leave_out_none_that_fits(sequences, share, most, epoch):
    """Also in packed rows: sequence by sequence, by its own length."""
    rows = rows_of(sequences, 220)
    rule, numbers = rule_of(share, most), np.arange(len(sequences))
    found = masking.masked(rows, rule, 90, masking.row_keys(1, epoch, 0, numbers))
    for row in numbers:
        positions = found["masked_lm_positions"][row]
        used = positions[positions > 0]
        assert (np.diff(used) > 0).all() and not positions[len(used):].any()
        assert (found["masked_lm_ids"][row, :len(used)] == rows["input_ids"][row, used]).all()
        words = words_in(rows["input_ids"][row])
        chosen = [word for word in words if word[0] in used]
        assert sorted(place for word in chosen for place in word) == used.tolist()
        for number in range(1, len(sequences[row]) + 1):
            length = int((rows["input_mask"][row] == number).sum())
            tokens = sum(len(word) for word in words if rows["input_mask"][row, word[0]] == number)
            left = min(int(rule.predictions(np.array(length))), tokens) - sum(
                len(word) for word in chosen if rows["input_mask"][row, word[0]] == number)
            assert left >= 0
            assert all(len(word) > left for word in words
                       if word not in chosen and rows["input_mask"][row, word[0]] == number)


def text_rows(count: int) -> dict[str, np.ndarray]:
    """Rows of one sequence with words of 1 to 4 pieces, most of one."""
    rng = np.random.default_rng(3)
    return rows_of([[rng.choice([1, 1, 1, 1, 1, 2, 2, 3, 4], 60).tolist()] for _ in range(count)], 256)


def test_statistics_are_those_of_plain_masks_and_each_piece_is_replaced_by_itself():
    rows = text_rows(1500)
    keys = masking.row_keys(5, 0, 0, np.arange(1500))
    plain, whole = (masking.masked(rows, rule_of(most=80, whole=whole), 80, keys) for whole in (False, True))
    shares = [np.count_nonzero(found["masked_lm_positions"]) / np.count_nonzero(rows["input_mask"])
              for found in (plain, whole)]
    assert abs(shares[0] - 0.15) < 0.001 and abs(shares[1] / shares[0] - 1) < 0.001
    row, slot = np.nonzero(whole["masked_lm_positions"])
    place = row, whole["masked_lm_positions"][row, slot]
    shown, original = whole["input_ids"][place], rows["input_ids"][place]
    hidden, by_chance = shown == MASK, 0.1 / (VOCABULARY - 5)
    assert abs(hidden.mean() - 0.8) < 0.006
    assert abs((shown == original).mean() - 0.1 - by_chance) < 0.005
    second = np.flatnonzero(PIECES[original])  # whether a piece is hidden does not depend on the piece before it
    both = hidden[second] & hidden[second - 1]
    assert abs(both.mean() - 0.64) < 0.03


def test_a_words_chance_does_not_depend_on_its_place_in_the_row():
    rows = {key: np.repeat(values, 4000, axis=0) for key, values in rows_of([[[1, 2, 1, 1, 3, 1, 1, 1]]], 16).items()}
    found = masking.masked(rows, rule_of(0.4), 8, masking.row_keys(1, 0, 0, np.arange(4000)))
    counts = np.bincount(found["masked_lm_positions"].ravel(), minlength=16)
    single = counts[[1, 4, 5, 9, 10, 11]]
    assert counts[2] == counts[3] and counts[6] == counts[7] == counts[8] > 0
    assert (abs(single / single.mean() - 1) < 0.1).all()


# --- through files ---

BITS = masking.packed_bits(np.arange(synthetic.VOCAB_SIZE) % 3 == 0)  # also of the words of synthetic rows


def write_new_shard(path, lengths, seed=0, sequence_length=128, predictions=20) -> None:
    """A shard without masks that says which tokens continue a word."""
    rows = synthetic.without_masks(synthetic.unpacked_rows(lengths, np.random.default_rng(seed), sequence_length,
                                                           predictions))
    write_shard(path, rows, replace(synthetic.rule(predictions), continuing=BITS), predictions)


def first_batch(shards) -> dict[str, np.ndarray]:
    stream = samples.batch_stream(shards, 20)
    batch = {key: values.numpy() for key, values in next(stream).items()}
    stream.close()
    return batch


def test_the_flag_of_the_training_masks_whole_words_of_shards_without_masks(tmp_path):
    samples.write_dataset(tmp_path, (20,), write=write_new_shard)
    plain = find_shards(tmp_path)
    whole = [shard.with_whole_words_masked() for shard in plain]
    batches = [first_batch(shards) for shards in (plain, whole)]
    cut = []
    for batch in batches:
        shown = synthetic.without_masks(batch)["input_ids"]
        after = batch["masked_lm_positions"] + 1
        used = batch["masked_lm_positions"] > 0
        inside = used & (np.take_along_axis(shown, after, axis=1) % 3 == 0) & (
            np.take_along_axis(shown, after, axis=1) > synthetic.SEP)
        cut.append(sum(not np.isin(after[row][inside[row]], batch["masked_lm_positions"][row]).all()
                       for row in range(20)))
    assert cut[0] > 5 and cut[1] == 0


@pytest.mark.parametrize("write, said", [
    (synthetic.write_shard_without_masks, "does not say which tokens continue a word"),
    (synthetic.write_unpacked_shard, "its rows are masked already, token by token")])
def test_shards_that_cannot_be_masked_by_words_are_refused(tmp_path, monkeypatch, write, said):
    monkeypatch.chdir(tmp_path)
    samples.write_config(tmp_path / "config.json")
    samples.write_dataset(tmp_path / "data", (20,), write=write)
    with pytest.raises(UserError, match=f"sample_training_0.hdf5: {said}") as refusal:
        run_pretraining.main(ranks.flags(1, "out", whole_word_mask=True))
    assert "create_hdf5_files" in str(refusal.value) and "\n" not in str(refusal.value)


def test_shards_of_other_masks_are_not_mixed(tmp_path):
    samples.write_dataset(tmp_path, (20, 20), write=synthetic.write_unpacked_shard)
    with h5py.File(tmp_path / "sample_training_1.hdf5", "a") as file:
        file.attrs["whole_word_mask"] = True
    with pytest.raises(UserError, match="sample_training_1.hdf5 is .*, whole words masked"):
        find_shards(tmp_path)
