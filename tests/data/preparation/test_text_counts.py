"""Claims about text that teaches little: its shares are printed and recorded, and it is warned of or refused."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

import create_pretraining_data
from common.errors import UserError
from data import bertPrep
from data.preparation.sentences import split_document
from data.preparation.text_counts import TextCounts, covered
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from tests.support.preparation import LETTERS, sentences, write_documents, write_vocabulary

THAI = ["ภาษา", "ไทย", "เป็น", "ของ", "และ", "มี", "เมือง", "หลวง", "ทะเล", "อาหาร", "ข้าว", "ปลา"]
KHMER = ["ភាសា", "ខ្មែរ", "ជា", "របស់", "និង", "មាន", "ទីក្រុង", "សមុទ្រ", "អាហារ", "បាយ"]
SIGNS = "人大中国上下山水火木金土日月天地小学生工作"


def unspaced(words) -> list[list[str]]:
    """Documents of sentences that are one word each."""
    draw = Random(1)
    return [["".join(draw.choices(words, k=40)) for _ in range(6)] for _ in range(20)]


def english(count: int = 12, size: int = 8) -> list[list[str]]:
    return [sentences(size, seed) for seed in range(count)]


def make(folder: Path, documents, vocabulary: Path, *flags) -> None:
    """create_pretraining_data.py on these documents, as folder/t.txt."""
    (folder / "t.txt").write_text("".join("\n".join(document) + "\n\n" for document in documents), encoding="utf-8")
    create_pretraining_data.main(["--input_file", str(folder / "t.txt"), "--output_file", str(folder / "t.hdf5"),
                                  "--vocab_file", str(vocabulary), "--max_seq_length", "48", *flags])


def vocabulary_of(folder: Path, words) -> Path:
    save_vocabulary(folder / "vocab.txt", [*SPECIAL_TOKENS, *words])
    return folder / "vocab.txt"


@pytest.mark.parametrize(("documents", "words"), [
    (unspaced(THAI), THAI),  # the vocabulary of the language does not help
    (unspaced(KHMER), [chr(number) for number in range(ord("a"), ord("z") + 1)]),
    ([["Идёт дождь", "Море старое"], ["Корабли плывут"]], ["the", "sea"]),
    ([["the sea", "old ships"], ["far out"]], ["▁the", "▁sea", "▁old"])])  # a SentencePiece vocabulary
def test_text_of_nothing_but_unknown_words_is_refused(tmp_path, documents, words):
    with pytest.raises(UserError, match=r"t.txt: each of its \d+ tokens is \[UNK\].*--vocab_file.*--do_lower_case"):
        make(tmp_path, documents, vocabulary_of(tmp_path, words))
    assert not (tmp_path / "t.hdf5").exists()


@pytest.mark.parametrize(("documents", "flags"), [
    (english(), ("--do_lower_case", "0")),  # an uncased vocabulary: each sentence begins with a capital
    ([*english(), *unspaced(THAI)], ()),
    ([[f"{sentence} Ωκεανός" for sentence in document] for document in english()], ())])
def test_many_unknown_words_are_warned_of_with_their_share(tmp_path, capsys, documents, flags):
    make(tmp_path, documents, write_vocabulary(tmp_path / "vocab.txt"), *flags)
    printed = capsys.readouterr().out
    share = float(printed.partition("text: ")[2].partition("% of the tokens are [UNK]")[0])
    assert share > 5 and f"warning: {share}% of the tokens are [UNK]: the vocabulary does not fit" in printed


def test_good_text_is_counted_and_not_warned_of(tmp_path, capsys):
    make(tmp_path, [*english(60), ["☃"]], write_vocabulary(tmp_path / "vocab.txt"))
    printed = capsys.readouterr().out
    assert "0.0% of the tokens are [UNK], " in printed and "of the pairs are random" in printed
    assert "warning" not in printed


@pytest.mark.parametrize(("documents", "reason"), [
    ([[sentence] for sentence in sentences(30)], "a blank line ends a document, so there should be none after every"),
    ([["the sea is deep"], ["old ships sail"]], "the documents have one sentence each"),
    ([[" ".join(sentences(8, seed)) for seed in range(number, number + 4)] for number in range(9)],
     "most sentences fill a sample by themselves"),
    ([sentences(40)], "0.0% of the pairs have a random second segment, and NSP learns nothing: a random segment comes "
                      "from another document")])
def test_pairs_of_one_kind_are_warned_of_with_the_reason(tmp_path, capsys, documents, reason):
    make(tmp_path, documents, write_vocabulary(tmp_path / "vocab.txt"))
    assert "NSP learns nothing" in (printed := capsys.readouterr().out) and reason in printed


@pytest.mark.parametrize("documents", [[[" ".join(sentences(60, seed))] for seed in range(5)], [["a lone sentence"]]])
def test_text_that_is_hardly_used_is_warned_of(tmp_path, capsys, documents):
    make(tmp_path, documents, write_vocabulary(tmp_path / "vocab.txt"), "--dupe_factor", "1")
    assert "the samples use only " in capsys.readouterr().out


def test_pieces_of_words_are_counted_and_many_are_warned_of(tmp_path, capsys):
    make(tmp_path, english(), vocabulary_of(tmp_path, [*LETTERS, *(f"##{letter}" for letter in LETTERS), "."]),
         "--dupe_factor", "1")
    printed = capsys.readouterr().out
    words = [word for document in english() for sentence in document for word in sentence.rstrip(".").split()]
    long, signs = sum(len(word) > 4 for word in words), sum(map(len, english()))
    pieces = sum(map(len, words)) + signs
    assert f" {pieces / (len(words) + signs):.2f} pieces a word, " in printed
    share = f"{long / (len(words) + signs):.1%} of the words are in more than 4"
    assert f"{share}, " in printed and (f"warning: {share} pieces: the vocabulary is too small" in printed) == (
        long > 0.05 * (len(words) + signs))


@pytest.mark.parametrize("flags", [(), ("--dynamic_masking",)])
def test_too_little_room_for_predictions_is_warned_of_with_the_share_reached(tmp_path, capsys, flags):
    make(tmp_path, english(), write_vocabulary(tmp_path / "vocab.txt"), "--max_predictions_per_seq", "3", *flags)
    printed = capsys.readouterr().out
    share = float(printed.partition("% of a sample is predicted")[0].rpartition(" ")[2])
    assert 5 < share < 12 and f"warning: {share}% of a sample is predicted, " in printed
    assert "--max_predictions_per_seq is too small" in printed


def test_covered_counts_each_position_once():
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 90, 30), rng.integers(1, 11, 30)
    positions = {start + offset for start, length in zip(starts.tolist(), lengths.tolist(), strict=True)
                 for offset in range(length)}
    assert covered(starts, lengths, 100) == len(positions)
    assert covered(starts[:0], lengths[:0], 100) == 0


def test_the_counts_are_in_the_records_and_older_records_lack_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BERT_PREP_WORKING_DIR", str(tmp_path))
    write_vocabulary(tmp_path / "vocab.txt")

    def stage(action, *flags):
        bertPrep.main(["--action", action, "--dataset", "wikicorpus_en", "--n_processes", "1", "--n_training_shards",
                       "1", "--n_test_shards", "1", *map(str, flags)])
        return capsys.readouterr().out

    stage("sharding", "--input_files", write_documents(tmp_path / "t.txt", [1] * 12))
    flags = ("--vocab_file", tmp_path / "vocab.txt", "--max_seq_length", 48)
    printed = stage("create_hdf5_files", *flags)
    assert "the documents have one sentence each" in printed and "0.0% of the tokens are [UNK]" in printed
    paths = list(tmp_path.glob("hdf5_*/records/wikicorpus_en/*.json"))
    records = {path: json.loads(path.read_text()) for path in paths}
    counts = {path.stem: record["counts"] for path, record in records.items()}
    training, test = counts["wikicorpus_en_training_0.hdf5"], counts["wikicorpus_en_test_0.hdf5"]
    assert training["unknown_tokens"] == 0 and training["used_tokens"] == training["tokens"] > test["tokens"]
    assert test["documents"] == 1 and test["used_tokens"] == 0, "a lone sentence is in no sample"
    for path, record in records.items():
        del record["counts"]["unknown_tokens"], record["counts"]["used_tokens"]
        path.write_text(json.dumps(record))
    printed = stage("create_hdf5_files", *flags)
    assert "[UNK]" not in printed and "100.0% of the pairs are random" in printed
    assert TextCounts.total([{"tokens": 3}, {"tokens": 4}]).tokens == 7


# the ends of sentences in other scripts


@pytest.mark.parametrize(("line", "expected"), [
    ("今天下雨。他走了！真的？是的", ["今天下雨。", "他走了！", "真的？", "是的"]),
    ("他说：“走吧。”然后走了。（真的！）好", ["他说：“走吧。”", "然后走了。", "（真的！）", "好"]),
    ("「行くぞ。」と言った。『本当か？！』彼は笑った｡",
     ["「行くぞ。」", "と言った。", "『本当か？！』", "彼は笑った｡"]),
    ("円周率は３．１４です．次", ["円周率は３．１４です．", "次"]),
    ("वह गया। मैं आया। ठीक", ["वह गया।", "मैं आया।", "ठीक"]),
    ("هل ذهب؟ نعم", ["هل ذهب؟", "نعم"]),
    ("Mr. Li said 好。Then he left. Gone.", ["Mr. Li said 好。", "Then he left.", "Gone."])])
def test_marks_of_other_scripts_end_a_sentence_without_a_space(line, expected):
    assert split_document(line, "punkt") == expected
    assert split_document(line, "nltk") != expected or " " in line


def test_chinese_paragraphs_are_used_and_half_their_pairs_are_true(tmp_path, capsys):
    draw = Random(1)
    paragraph = ["".join("".join(draw.choices(SIGNS, k=25)) + "。" for _ in range(20)) for _ in range(24)]
    documents = [split_document("\t".join(paragraph[start:start + 2]), "punkt") for start in range(0, 24, 2)]
    assert all(len(document) == 40 for document in documents)
    make(tmp_path, documents, vocabulary_of(tmp_path, [*SIGNS, "。"]), "--dupe_factor", "1")
    counts = capsys.readouterr().out
    assert "warning" not in counts and "0.0% of the tokens are [UNK]" in counts
