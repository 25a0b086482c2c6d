"""Claims about the samples that are made of text, and the command that makes them."""

import os
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import create_pretraining_data
from common.errors import UserError
from data.preparation import samples
from data.preparation.samples import Documents, SampleOptions
from data.shards import read_header, read_rows
from data.tokenizer import SPECIAL_TOKENS

WORDS = ["the", "sea", "is", "deep", "and", "old", "ships", "sail", "far", "out", "##s", "."]
TOKENS = [*SPECIAL_TOKENS, *WORDS]
CLS, SEP, MASK = 2, 3, 4


def options(**changes) -> SampleOptions:
    return SampleOptions(**({"max_seq_length": 19, "max_predictions_per_seq": 4, "dupe_factor": 3} | changes))


def documents_of(sizes) -> Documents:
    """Documents of sentences of the given lengths, with tokens that are all different: token t has the id 100 + t."""
    lengths = [length for document in sizes for length in document]
    first = np.cumsum([0, *map(len, sizes)])
    return Documents(np.arange(100, 100 + sum(lengths), dtype=np.int32), np.cumsum([0, *lengths]), first)


def document_of(documents: Documents, token: int) -> int:
    """Which document the token at an offset belongs to."""
    sentence = np.searchsorted(documents.bounds, token, side="right") - 1
    return int(np.searchsorted(documents.first, sentence, side="right") - 1)


corpora = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=9), min_size=1, max_size=5)


@given(corpora, st.integers(5, 40), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_pairs_fit_and_random_segments_come_from_other_documents(sizes, length, seed):
    documents = documents_of(sizes)
    wanted = options(max_seq_length=length)
    pairs = samples.plan_pairs(documents, wanted, Random(seed))
    pairs = samples.truncate(pairs, wanted, np.random.default_rng(seed))
    assert ((pairs.a_length >= 1) & (pairs.b_length >= 1)).all()
    assert (pairs.a_length + pairs.b_length <= length - 3).all()
    for row in range(len(pairs)):
        pair = pairs[[row]]
        ends = [pair.a_start[0], pair.a_start[0] + pair.a_length[0] - 1,
                pair.b_start[0], pair.b_start[0] + pair.b_length[0] - 1]
        of = [document_of(documents, token) for token in ends]
        assert of[0] == of[1] and of[2] == of[3]
        assert (of[0] != of[2]) == bool(pair.is_random[0])
        assert pair.is_random[0] or ends[2] > ends[1]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 50))
def test_truncation_equals_removing_tokens_one_by_one(a, b, longest):
    pairs = np.array([(0, a, 1000, b, 0)], samples.PAIR).view(np.recarray)
    cut = samples.truncate(pairs, options(max_seq_length=longest + 3), np.random.default_rng(a))
    while a + b > longest:  # as Devlin et al. do it
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert (cut.a_length[0], cut.b_length[0]) == (a, b)


def rows_of(sizes, wanted: SampleOptions, tmp_path) -> dict:
    """The rows of a shard made of documents of sentences of the given lengths, in words of a tiny vocabulary."""
    random = Random(7)
    text = "\n\n".join("\n".join(" ".join(random.choices(WORDS[:10], k=length)) for length in document)
                       for document in sizes)
    (tmp_path / "x_training_0.txt").write_text(text)
    samples.create_shard(tmp_path / "x_training_0.txt", tmp_path / "x.hdf5", TOKENS, wanted)
    return read_rows(read_header(tmp_path / "x.hdf5"))


def test_rows_hold_what_the_schema_says(tmp_path):
    wanted = options()
    rows = rows_of([[5, 3, 8, 2], [1], [30, 4], [2, 2, 2, 2, 2]], wanted, tmp_path)
    assert len(rows["input_ids"]) > 10
    for number in range(len(rows["input_ids"])):
        row = {key: values[number] for key, values in rows.items()}
        length = row["input_mask"].sum()
        masked = row["masked_lm_positions"][row["masked_lm_positions"] > 0]
        original = row["input_ids"].copy()
        original[masked] = row["masked_lm_ids"][:len(masked)]
        assert (row["input_mask"][:length] == 1).all() and not original[length:].any()
        assert original[0] == CLS and original[length - 1] == SEP and (original == SEP).sum() == 2
        first_sep = int(np.argmax(original == SEP))
        assert (row["segment_ids"] == [first_sep < column < length for column in range(19)]).all()
        assert len(masked) == min(4, max(1, round(length * 0.15))) and (np.diff(masked) > 0).all()
        assert not np.isin(original[masked], [CLS, SEP]).any()
        assert not row["masked_lm_ids"][len(masked):].any()


def test_masked_tokens_are_80_percent_mask_10_random_10_kept(tmp_path):
    rows = rows_of([[9] * 40] * 60, options(max_seq_length=64, max_predictions_per_seq=10, dupe_factor=40), tmp_path)
    row, slot = np.nonzero(rows["masked_lm_positions"])
    shown = rows["input_ids"][row, rows["masked_lm_positions"][row, slot]]
    original = rows["masked_lm_ids"][row, slot]
    assert len(shown) > 100_000
    kept_by_chance = 0.1 / len(WORDS)  # a random word may be the word itself
    assert abs((shown == MASK).mean() - 0.8) < 0.01
    assert abs((shown == original).mean() - 0.1 - kept_by_chance) < 0.01


def test_a_single_document_gives_only_true_pairs(tmp_path):
    rows = rows_of([[4, 5, 6, 7, 3]], options(), tmp_path)
    assert len(rows["input_ids"]) and not rows["next_sentence_labels"].any()


def test_a_lone_sentence_without_another_document_gives_an_empty_shard(tmp_path):
    assert len(rows_of([[5]], options(), tmp_path)["input_ids"]) == 0


def test_more_prediction_slots_than_tokens_leave_no_token_unpredicted(tmp_path):
    wanted = options(max_predictions_per_seq=30, masked_lm_prob=1.0)
    rows = rows_of([[5, 3, 8, 2], [1], [30, 4]], wanted, tmp_path)
    assert rows["masked_lm_positions"].shape[1] == 30
    assert ((rows["masked_lm_positions"] > 0).sum(axis=1) == rows["input_mask"].sum(axis=1) - 3).all()


def test_a_text_shard_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "x_training_0.txt"
    path.write_bytes(b"the sea\n\xff\xfe\n")
    with pytest.raises(UserError, match="x_training_0.txt: not UTF-8"):
        samples.create_shard(path, tmp_path / "x.hdf5", TOKENS, options())
    assert not (tmp_path / "x.hdf5").exists()


@pytest.mark.parametrize("flag, value, said", [
    ("input_file", "empty", "empty: neither a file nor a folder with *.txt files in it"),
    ("input_file", "t.txt,none.txt", "--input_file none.txt: no such file"),
    ("output_file", "t.txt/x.hdf5", "--output_file t.txt/x.hdf5: cannot be written: "),
    ("random_seed", "-1", "--random_seed -1 is negative"),
    ("vocab_file", "special.txt", "special.txt: no words beside the special tokens")])
def test_what_the_command_cannot_use_is_named_in_a_line(tmp_path, monkeypatch, flag, value, said):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("the sea\nis deep\n")
    Path("empty").mkdir()
    Path("v.txt").write_text("\n".join(TOKENS))
    Path("special.txt").write_text("\n".join(SPECIAL_TOKENS))
    flags = {"input_file": "t.txt", "output_file": "x.hdf5", "vocab_file": "v.txt", flag: value}
    with pytest.raises(UserError) as refusal:
        create_pretraining_data.main([f"--{name}={given}" for name, given in flags.items()])
    assert said in str(refusal.value) and "\n" not in str(refusal.value)
    assert not Path("x.hdf5").exists()


@given(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=5), min_size=1, max_size=30), st.integers(1, 60))
@settings(deadline=None)
def test_blocks_hold_whole_documents_and_all_of_them(sizes, block):
    documents = [[f"{'x' * length}." for length in document] for document in sizes]
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "READ_BYTES", block)
        path = Path(folder, "x.txt")
        path.write_text("".join("\n".join(document) + "\n\n" for document in documents))
        blocks = list(samples.document_blocks(path))
    assert [line for lines in blocks for line in lines] == [line for document in documents for line in [*document, ""]]
    assert all(lines[-1] == "" for lines in blocks)


def test_a_shard_read_in_blocks_holds_the_documents_of_one_read_at_once(tmp_path, monkeypatch):
    text = "".join("the sea is deep .\nships sail far out .\n\n" for _ in range(20))
    (tmp_path / "x_training_0.txt").write_text(text)
    counts = []
    for size in (1 << 20, 200):
        monkeypatch.setattr(samples, "READ_BYTES", size)
        counts.append(samples.create_shard(tmp_path / "x_training_0.txt", tmp_path / "x.hdf5", TOKENS, options()))
        assert read_header(tmp_path / "x.hdf5").rows == counts[-1]["samples"] > 60
    assert all(counts[0][key] == counts[1][key] for key in ("documents", "sentences", "tokens"))
    assert counts[0]["documents"] == 20


def test_names_of_files_need_not_be_utf8_and_the_seed_is_that_of_their_bytes(tmp_path, monkeypatch):
    """A name that is UTF-8 gives the same rows where the locale knows ASCII only, and reads its bytes as surrogates."""
    monkeypatch.chdir(tmp_path)
    shards = {}
    for name in (b"caf\xe9", "caf\u00e9".encode()):
        Path(os.fsdecode(name + b".txt")).write_text("the sea\nis deep\n\nold ships\nsail far\n" * 9)
        for place, words in enumerate((os.fsdecode(name), name.decode("ascii", "surrogateescape"))):
            samples.create_shard(f"{words}.txt", f"{words}_{place}.hdf5", TOKENS, SampleOptions())
            shards[name, place] = Path(os.fsdecode(name + b"_%d.hdf5" % place)).read_bytes()
        assert shards[name, 0] == shards[name, 1]
    assert len(set(shards.values())) == 2
