"""Samples without a second segment: no token is lost; and predictions per sample that follow from the share."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import create_pretraining_data
from data.preparation import samples
from data.preparation.full_sentences import FullSentences
from data.preparation.layout import hdf5_folder
from data.preparation.samples import SampleOptions
from data.shards import LABELS, MASK_KEYS, find_shards, read_header, read_rows
from data.tokenizer import SPECIAL_TOKENS, continuing_tokens, load_vocabulary
from tests.data.preparation.test_samples import corpora, documents_of
from tests.support.preparation import LETTERS, sentences, write_vocabulary

CLS, SEP = 2, 3


@given(corpora, st.integers(5, 40), st.integers(1, 3))
@settings(max_examples=200, deadline=None)
def test_rows_hold_every_token_once_a_pass_and_no_second_segment(sizes, length, passes):
    """In the order of the text: [CLS] sentences [SEP], with a [SEP] between documents and nowhere else."""
    documents = documents_of(sizes)
    found = FullSentences(documents, SampleOptions(max_seq_length=length, dupe_factor=passes), (0, 1, 2, 3, 4))
    rows = found.rows(np.arange(len(found.lengths)), length)
    assert not rows["segment_ids"].any()
    assert (rows["input_mask"].sum(axis=1) == found.lengths).all() and found.lengths.max() <= length
    ends = set(documents.bounds[1:].tolist())
    document_ends = set(documents.bounds[documents.first].tolist())
    tokens = []
    for ids, mask in zip(rows["input_ids"].tolist(), rows["input_mask"].tolist(), strict=True):
        ids, padding = ids[:sum(mask)], ids[sum(mask):]
        assert ids[0] == CLS and ids[-1] == SEP and not any(padding) and mask == sorted(mask, reverse=True)
        inner = [token for token in ids[1:-1] if token != SEP]
        for place, token in enumerate(ids[1:-2], start=1):  # a [SEP] follows where a document ends, and only there
            assert token == SEP or (ids[place + 1] == SEP) == (token - 100 + 1 in document_ends)
        end, size = inner[-1] - 100 + 1, len(ids)
        assert end in ends or size == length  # only a sentence that is longer than a sample is cut
        tokens += inner
    assert tokens == documents.ids.tolist() * passes
    assert len(found.lengths) <= passes * (sum(sum(d) for d in sizes) + len(sizes)) and found.used_tokens == len(
        documents.ids)


def test_a_sample_takes_all_sentences_that_fit():
    found = FullSentences(documents_of([[4, 4], [3, 9, 1], [30]]), SampleOptions(max_seq_length=14, dupe_factor=1),
                          (0, 1, 2, 3, 4))
    assert found.lengths.tolist() == [14, 12, 14, 14, 8]


@pytest.mark.parametrize("length, share, predictions", [
    (128, 0.15, 20), (512, 0.15, 80), (128, 0.4, 52), (512, 0.4, 208), (64, 0.15, 12), (16, 1.0, 13), (20, 0.1, 4)])
def test_predictions_follow_from_length_and_share(length, share, predictions):
    options = SampleOptions(max_seq_length=length, masked_lm_prob=share)
    assert options.max_predictions_per_seq == predictions
    assert predictions >= length - 3 or length * share <= predictions < length * share + 4
    assert options.limit_warning() is None
    assert f"_max_pred_{predictions}_masked_lm_prob_{share}_" in hdf5_folder(options).name
    typed = SampleOptions(max_seq_length=length, masked_lm_prob=share, max_predictions_per_seq=1)
    assert typed.max_predictions_per_seq == 1 and "--max_predictions_per_seq 1 is below" in str(typed.limit_warning())


def test_the_published_pairs_keep_their_folders_and_their_records():
    """A data set that an earlier version finished is not made again."""
    for length, predictions in ((128, 20), (512, 80)):
        options = SampleOptions(max_seq_length=length, max_predictions_per_seq=predictions)
        assert options == SampleOptions(max_seq_length=length) and options.limit_warning() is None
        assert hdf5_folder(options).name == (f"hdf5_lower_case_1_seq_len_{length}_max_pred_{predictions}_masked_lm_prob"
                                             "_0.15_random_seed_12345_dupe_factor_5")
        assert options.recorded() == {
            "max_seq_length": length, "max_predictions_per_seq": predictions, "masked_lm_prob": 0.15, "dupe_factor": 5,
            "short_seq_prob": 0.1, "random_seed": 12345, "do_lower_case": True, "dynamic_masking": False}
    changed = SampleOptions(whole_word_mask=True, no_nsp=True)
    assert hdf5_folder(changed).name.endswith("_dupe_factor_5_whole_word_mask_no_nsp")
    assert changed.recorded()["whole_word_mask"] and changed.recorded()["no_nsp"]


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text shard with many words in pieces, and a vocabulary."""
    monkeypatch.chdir(tmp_path)
    write_vocabulary("vocab.txt")
    draw = Random(2)
    documents = [[f"{sentence[:-1]} {''.join(draw.choices(LETTERS, k=3))} ." for sentence in sentences(20, seed)]
                 for seed in range(30)]
    (tmp_path / "t_training_0.txt").write_text("\n\n".join("\n".join(document) for document in documents))
    return tmp_path


def create(*flags) -> dict:
    create_pretraining_data.main(["--input_file=t_training_0.txt", "--output_file=s_training.hdf5",
                                  "--vocab_file=vocab.txt", "--max_seq_length=128", *flags])
    return read_rows(read_header("s_training.hdf5"))


def test_the_command_masks_whole_words_and_makes_rows_of_full_sentences(text, capsys):
    rows = create("--whole_word_mask", "--no_nsp", "--masked_lm_prob=0.4", "--dupe_factor=2")
    printed = capsys.readouterr().out
    share = float(printed.partition("% of a sample is predicted")[0].rpartition(" ")[2])
    assert 39.0 < share < 40.5 and "random" not in printed.partition("text: ")[2] and "warning" not in printed
    shard = read_header("s_training.hdf5")
    assert shard.objective == samples.shards.Objective(nsp=False, whole_word_mask=True)
    assert shard.prediction_slots == 52 and LABELS not in rows and not rows["segment_ids"].any()
    assert find_shards(".")[0].description.endswith("a row, without next sentence prediction, whole words masked")
    continuing = continuing_tokens(load_vocabulary("vocab.txt"))
    shown = rows["input_ids"].copy()
    row, slot = np.nonzero(rows["masked_lm_positions"])
    shown[row, rows["masked_lm_positions"][row, slot]] = rows["masked_lm_ids"][row, slot]
    masked = np.zeros(shown.shape, bool)
    masked[row, rows["masked_lm_positions"][row, slot]] = True
    inside = continuing[shown[:, 1:]] & (shown[:, :-1] > len(SPECIAL_TOKENS) - 1)
    assert inside.sum() > 500 and (masked[:, 1:] == masked[:, :-1])[inside].all()
    assert set(create("--no_nsp", "--dynamic_masking")) == {"input_ids", "input_mask", "segment_ids"}
    assert read_header("s_training.hdf5").rule.continues_word.tolist() == continuing.tolist()
    assert set(create()) > {LABELS, *MASK_KEYS} and not read_header("s_training.hdf5").objective.description


def test_a_limit_that_bites_is_warned_of_and_rows_of_both_kinds_are_not_mixed(text, capsys):
    create("--masked_lm_prob=0.4", "--max_predictions_per_seq=20")
    assert ("warning: --max_predictions_per_seq 20 is below the 51 that --masked_lm_prob 0.4 asks for in 128 tokens: "
            "of these 15.6% will be predicted (without the flag, up to 52") in capsys.readouterr().out
    (text / "s_training.hdf5").rename(text / "other_training.hdf5")
    create("--masked_lm_prob=0.4", "--max_predictions_per_seq=20", "--no_nsp")
    with pytest.raises(samples.UserError, match="s_training.hdf5 is .* without next sentence prediction"):
        find_shards(text)
