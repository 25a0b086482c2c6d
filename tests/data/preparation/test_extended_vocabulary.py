"""Claims about --extend_vocab: words of a domain in a published vocabulary, each found as one token afterwards."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data import bertPrep
from data.preparation.extended_vocabulary import extend, read_words
from data.shards import find_shards, read_rows
from data.tokenizer import SPECIAL_TOKENS, WordPieceEncoder, load_vocabulary, save_vocabulary
from tests.support.preparation import LETTERS, ROOT, files_below, sentences

PUBLISHED = ["[PAD]", "[unused0]", "[unused1]", *SPECIAL_TOKENS[1:], "[unused2]", "sea", *LETTERS,
             *(f"##{letter}" for letter in LETTERS), ".", "é", "É"]
FREE = [1, 2, 7]


def tokens_of(vocabulary, text: str, lower_case: bool) -> list[str]:
    ids, _ = WordPieceEncoder(vocabulary, lower_case, fast=False).encode([text])
    return [vocabulary[number] for number in ids]


def test_words_take_the_unused_places_in_order_then_new_ones_and_the_rest_keeps_its_id():
    words = ["gulls", "sea", "compass", "gulls", "harbour", "wind", "seas"]
    extended = extend(PUBLISHED, words, lower_case=True)
    assert extended.tokens[1:3] == ["gulls", "compass"] and extended.tokens[7] == "harbour"
    assert extended.tokens[len(PUBLISHED):] == ["wind", "seas"]
    assert all(extended.tokens[number] == token for number, token in enumerate(PUBLISHED) if number not in FREE)
    assert extended.counts == {"tokens": len(PUBLISHED) + 2, "in_unused_places": 3, "behind": 2, "there_before": 2,
                               "no_tokens": 0}


@pytest.mark.parametrize("lower_case, expected", [(True, ["uber", "strasse", "ecole"]), (False, ["Über", "École"])])
def test_words_get_the_case_of_the_vocabulary(lower_case, expected):
    published = PUBLISHED + ([] if lower_case else ["strasse"])
    extended = extend(published, ["Über", "strasse", "École", *(["über", "ECOLE"] if lower_case else [])], lower_case)
    assert [token for token in extended.tokens if token not in published] == expected
    assert tokens_of(extended.tokens, "Über strasse École", lower_case)[0] == expected[0]


def test_lines_that_can_be_no_token_are_left_out_and_named():
    lines = ["covid-19", "two words", "北京", "x" * 101, "[MASK]", "##itis", "naïve"]
    extended = extend(PUBLISHED, lines, lower_case=True)
    assert extended.no_tokens == lines[:-1] and extended.tokens[1] == "naive"


@given(st.lists(st.text(min_size=1, max_size=12), max_size=12), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_new_word_is_one_token_of_any_text_that_holds_it(lines, lower_case):
    extended = extend(PUBLISHED, lines, lower_case)
    assert len(set(extended.tokens)) == len(extended.tokens)
    new = [line for line in lines if line not in extended.no_tokens]
    assert all(len(tokens_of(extended.tokens, line, lower_case)) == 1 for line in new)
    counts = extended.counts
    assert counts["in_unused_places"] + counts["behind"] + counts["there_before"] + counts["no_tokens"] == len(lines)


def stage(action: str, *flags) -> None:
    bertPrep.main(["--action", action, "--dataset", "mine", "--n_processes", "1", *map(str, flags)])


@pytest.fixture
def files(work):
    Path("mine_training_0.txt").write_text("\n".join(sentences(60)) + "\n\n" + "\n".join(sentences(60, 1)) + "\n")
    Path("words.txt").write_text("\ufeffgulls\r\n\r\n  Compass \r\nsea\r\nsea-gull\r\n", encoding="utf-8")
    save_vocabulary("published/vocab.txt", PUBLISHED)
    return work


def test_samples_are_made_with_the_extended_vocabulary_and_a_stage_does_its_work_once(files, capsys):
    flags = ("--vocab_file", "published", "--extend_vocab", "words.txt")
    stage("create_vocabulary", *flags)
    made = files / "vocab/mine/vocab.txt"
    assert "2 new words, 2 of them in [unusedN] places and 0 behind; 1 were there before; 1 lines can be no token, " \
        "since the tokenizer splits them: 'sea-gull'" in capsys.readouterr().out
    assert load_vocabulary(made)[1:3] == ["gulls", "compass"]
    before = made.stat().st_mtime_ns
    samples = ("--input_files", "mine_training_0.txt", "--max_seq_length", 32, "--dupe_factor", 1)
    stage("create_hdf5_files", *samples)
    stage("create_hdf5_files", *samples, *flags)
    assert made.stat().st_mtime_ns == before and f"vocabulary: {made}" in capsys.readouterr().out
    shard, = find_shards(next(files.glob("hdf5_*/mine")))
    assert np.count_nonzero(read_rows(shard, ["input_ids"])["input_ids"] == 1) > 20, "gulls"
    Path("words.txt").write_text("gulls\nwind\n")
    stage("create_hdf5_files", *samples, *flags)
    assert load_vocabulary(made)[1:3] == ["gulls", "wind"]


def test_a_file_without_words_or_of_no_text_is_refused_and_nothing_written(files):
    before = files_below(files)
    for content, said in ((b"\n \n", "empty.txt: no words in it"), (b"\xff\xfe\xff", "empty.txt: cannot be read"),
                          (b"\xc3(", "empty.txt: cannot be read")):
        Path("empty.txt").write_bytes(content)
        with pytest.raises(UserError, match=f"--extend_vocab {said}"):
            stage("create_vocabulary", "--vocab_file", "published", "--extend_vocab", "empty.txt")
    with pytest.raises(UserError, match="nowhere.txt: cannot be read"):
        read_words("nowhere.txt")
    with pytest.raises(UserError, match="--do_lower_case 0: Google's vocabulary is of lower case"):
        stage("create_vocabulary", "--extend_vocab", "words.txt", "--do_lower_case", 0)
    assert files_below(files) == before


@pytest.mark.parametrize("flag", ["--extend_vocab words.txt", "--extend-vocab=words.txt"])
def test_the_script_names_the_words_as_seen_from_where_it_was_called(tmp_path, flag):
    """A python that says what it is called with stands in for the real one."""
    (tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python").chmod(0o755)
    script = ROOT / "data/create_datasets_from_start.sh"
    called = subprocess.run(["bash", script, "corpus", "mine", "text", *flag.split()], cwd=tmp_path, check=True,
                            env=os.environ | {"PYTHON": str(tmp_path / "python"), "VOCAB_FILE": "v.txt"},
                            capture_output=True, text=True).stdout
    lines = [line for line in called.splitlines() if "--action create_hdf5_files" in line]
    assert len(lines) == 2 and all(f"{tmp_path}/words.txt" in line for line in lines)
