"""Claims about files that users bring: their encodings, line ends, compressions and names."""

import bz2
import gzip
import lzma
import shutil
import zipfile
from pathlib import Path

import pytest

import create_pretraining_data
import fill_mask
from common.bert_config import BertConfig
from common.errors import UserError
from common.text import lines_of_text
from data import bertPrep
from data.preparation import books, estimates
from data.preparation.named_files import names_in
from data.shards import find_shards, read_header
from data.tokenizer import load_vocabulary
from tests.support import samples
from tests.support.preparation import formatted, page, sentences, write_documents, write_vocabulary

DUMP = b"<mediawiki>\n" + page("Sea", "A good text.") + b"</mediawiki>\n"
ODD_MARKS = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


def encoded(text: str, encoding: str) -> bytes:
    """With a byte order mark where UTF-16 is named with its order, too."""
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    return (mark + text).encode(encoding)


def stage(action: str, *flags, dataset: str = "wikicorpus_en") -> None:
    bertPrep.main(["--action", action, "--dataset", dataset, "--n_processes", "1", "--n_training_shards", "2",
                   "--n_test_shards", "1", *map(str, flags)])


def make(*files: str, **flags) -> dict:
    """create_pretraining_data.py with t.hdf5 as its output; what it holds."""
    flags = {"output_file": "t.hdf5", "vocab_file": "vocab.txt", "max_seq_length": 32, **flags}
    create_pretraining_data.main(["--input_file", *files, *(f"--{name}={value}" for name, value in flags.items())])
    return Path("t.hdf5").read_bytes()


# encodings and the ends of lines


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_and_vocabularies_are_read_in_every_encoding_that_marks_itself(work, encoding):
    text = "".join("\n".join(sentences(5, seed)) + "\n\n" for seed in range(9))
    words = write_vocabulary("vocab.txt").read_text()
    Path("t.txt").write_text(text)
    expected = make("t.txt")
    Path("t.txt").write_bytes(encoded(text.replace("\n", "\r\n"), encoding))
    Path("vocab.txt").write_bytes(encoded(words.replace("\n", "\r\n"), encoding))
    assert make("t.txt") == expected and load_vocabulary("vocab.txt") == words.split()
    write_documents(Path("documents.txt").absolute(), [5] * 9)
    for name in ("documents.txt", "t.txt"):
        content = Path("documents.txt").read_text()
        Path(name).write_bytes(content.encode() if name == "documents.txt" else encoded(content, encoding))
        stage("sharding", "--input_files", name)
        shards = [path.read_bytes() for path in sorted(work.glob("sharded_*/*/*.txt"))]
        expected = shards if name == "documents.txt" else expected
    assert shards == expected and len(shards) == 3
    Path("shelf").mkdir()
    Path("shelf/BOOK.TXT").write_bytes(encoded("Old ships.\r\n\r\nDeep sea.", encoding))
    assert books.read_book(Path("shelf/BOOK.TXT")) == ("Old ships.\tDeep sea.", None)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_configs_are_read_in_every_encoding(work, encoding):
    path = samples.write_config(Path("config.json"))
    plain = BertConfig.from_json_file(path)
    path.write_bytes(encoded(path.read_text().replace("\n", "\r\n"), encoding))
    assert BertConfig.from_json_file(path) == plain


@pytest.mark.parametrize("order", ["le", "be"])
def test_utf16_without_a_mark_is_named_with_the_way_to_convert_it(work, order):
    words = write_vocabulary("vocab.txt").read_text()
    Path("t.txt").write_bytes("the sea\n".encode(f"utf-16-{order}"))
    Path("words.txt").write_bytes(words.encode(f"utf-16-{order}"))
    for call in (lambda: make("t.txt"), lambda: load_vocabulary("words.txt"),
                 lambda: stage("sharding", "--input_files", "t.txt")):
        with pytest.raises(UserError, match=f"not UTF-8 .*iconv -f UTF-16{order.upper()} -t UTF-8"):
            call()
    Path("half.txt").write_bytes("the sea\n".encode("utf-16")[:-1])
    for call in (lambda: make("half.txt"), lambda: stage("sharding", "--input_files", "half.txt")):
        with pytest.raises(UserError, match=r"half.txt: not UTF-16|half.txt: not utf-16"):
            call()


def test_only_a_line_feed_ends_a_line(work):
    write_vocabulary("vocab.txt")
    Path("t.txt").write_text(f"the sea {ODD_MARKS} is deep\nold ships\n\nfar out\n", newline="\n")
    counts = create_pretraining_data.create_shard("t.txt", "t.hdf5", load_vocabulary("vocab.txt"),
                                                  create_pretraining_data.SampleOptions(max_seq_length=32))
    assert (counts["documents"], counts["sentences"]) == (2, 3)
    Path("d.txt").write_text("".join(f"Ships {ODD_MARKS} sail.\tFar out.\n" for _ in range(5)), newline="\n")
    stage("sharding", "--input_files", "d.txt")
    lines = [line for path in work.glob("sharded_*/*/*.txt") for line in path.read_text().split("\n") if line]
    assert sorted(set(lines)) == ["Far out.", "Ships one two three four five six seven sail."] and len(lines) == 10
    Path("sentences.txt").write_text("a sentence of several words\u2028and of some more here\n" * 3)
    assert len(set(fill_mask.random_sentences("sentences.txt", 3, 1))) == 1
    assert lines_of_text("a\r\r\nb\u2028\n\n") == ["a", "b\u2028", ""]


# dumps


@pytest.mark.parametrize(("name", "compress"), [
    ("dump.xml.bz2.1", bz2.compress), ("dump.xml.gz", gzip.compress), ("dump.xml.xz.1", lzma.compress),
    ("dump", gzip.compress), ("dump.xml", bz2.compress), ("dump.xml.gz", lzma.compress), ("dump.xml.bz2", bytes)])
def test_a_dump_is_known_by_its_first_bytes(work, name, compress):
    Path(name).write_bytes(compress(DUMP))
    assert estimates.input_size([Path(name)]) == Path(name).stat().st_size * (1 if compress is bytes else estimates.BZ2)
    stage("text_formatting", "--input_files", name)
    assert formatted(work, "wikicorpus_en") == ["A good text."]


@pytest.mark.parametrize(("content", "said"), [
    (b"\n<!DOCTYPE html>\n<html><head><title>404 Not Found</title>", "an HTML page"),
    (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!doctype HTML PUBLIC "x">', "an HTML page"),
    (b"<HTML>\r\n<body>503 Service Unavailable", "an HTML page"),
    (b"PK\x03\x04\x14\x00", "a zip archive"), (b"7z\xbc\xaf\x27\x1c\x00", "a 7z archive"),
    (DUMP.decode().encode("utf-16"), "UTF-16, but a dump is UTF-8: iconv -f UTF-16"),
    (gzip.compress(DUMP, mtime=0)[:-20], "damaged or cut short"), (lzma.compress(DUMP)[:-30], "damaged or cut short"),
    (b"no dump", r"damaged or cut short \(neither bz2 nor XML")])
def test_what_is_no_dump_is_named(work, content, said):
    Path("x.xml.bz2").write_bytes(content)
    with pytest.raises(UserError, match=f"x.xml.bz2: {said}"):
        stage("text_formatting", "--input_files", "x.xml.bz2")


def test_archives_of_books_are_known_by_their_first_bytes(work, capsys):
    with zipfile.ZipFile("books.zip.1", "w") as file:
        for name, text in (("A.TXT", "Good book."), ("__MACOSX/._A.TXT", "\0\5\26\7"), ("cover.jpg", "x")):
            file.writestr(name, text)
    stage("download", "--input_files", "books.zip.1", dataset="bookscorpus")
    stage("text_formatting", dataset="bookscorpus")
    assert formatted(work, "bookscorpus") == ["Good book."]
    for content, said in ((b"<html>gone", "an HTML page"), (bz2.compress(b"x"), "no readable archive"),
                          (b"\x80\x81", "neither an archive nor a list of URLs")):
        Path("books.zip").write_bytes(content)
        with pytest.raises(UserError, match=f"books.zip: {said}"):
            stage("download", "--input_files", "books.zip", dataset="bookscorpus")


def test_hidden_files_beside_books_are_left_out_and_html_is_listed(work, capsys):
    for name, text in (("a.TXT", "Good book."), ("._a.TXT", "\0\5\26\7"), (".Trash/b.txt", "Old book."),
                       ("c.txt", "<!-- gone -->\n<!doctype html><p>404"), ("d.txt", "The <html> tag is old.")):
        Path("shelf", name).parent.mkdir(parents=True, exist_ok=True)
        Path("shelf", name).write_text(text)
    stage("text_formatting", "--input_files", "shelf", dataset="bookscorpus")
    assert formatted(work, "bookscorpus") == ["Good book.", "The <html> tag is old."]
    assert "2 documents, 1 skipped" in (printed := capsys.readouterr().out) and "c.txt: an HTML page" in printed


# names


def test_commas_folders_and_patterns_name_several_files(work, capsys):
    write_vocabulary("vocab.txt")
    for number in range(3):
        write_documents(Path(f"text/part {number}.txt").absolute(), [6] * 6, seed=number)
    Path("text/a,b.TXT").write_text("A lone one.\n")
    for words in (["text"], ["text/*.txt", "text/a,b.TXT"],
                  ["text/a,b.TXT", "text/part 0.txt,text/part 1.txt", "text/*2.txt"]):
        stage("sharding", "--input_files", *words)
        assert "19 documents" in capsys.readouterr().out
    whole = make("text/part 0.txt", "text/part 1.txt")
    assert make("text/part 0.txt,text/part 1.txt") == whole == make("text/part [01].txt")
    assert "2 documents" in capsys.readouterr().out, "the end of a file ends a document"
    for words in (["text/none.txt"], ["vocab.txt,text/none*"]):
        with pytest.raises(UserError, match="--input_files? text/none.*: no such file"):
            stage("sharding", "--input_files", *words)
    with pytest.raises(UserError, match="a file is named twice"):
        make("text/part 0.txt,text/part*")
    with pytest.raises(UserError, match="--input_files ,: names no file"):
        stage("sharding", "--input_files", ",")
    assert names_in(["s3://b/a,s3://b/c"]) == ["s3://b/a", "s3://b/c"]


def test_sharded_text_without_records_is_taken_where_it_is_complete(work, capsys):
    flags = ("--vocab_file", write_vocabulary("vocab.txt").absolute(), "--max_seq_length", 32)
    stage("sharding", "--input_files", write_documents(Path("t.txt").absolute(), [9] * 12))
    stage("create_hdf5_files", *flags)
    ours = {path.name: path.read_bytes() for path in work.glob("hdf5_*/wikicorpus_en/*.hdf5")}
    folder = next(work.glob("sharded_*"))
    shutil.rmtree(folder / "records")
    shutil.rmtree(next(work.glob("hdf5_*")))
    stage("create_vocabulary", "--vocab_size", 60)
    capsys.readouterr()
    stage("create_hdf5_files", *flags)
    assert "its 3 text shards are taken as they are" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in work.glob("hdf5_*/wikicorpus_en/*.hdf5")} == ours
    stage("create_hdf5_files", *flags, "--random_seed", 1, "--input_files", folder)
    assert len(find_shards(next(work.glob("hdf5_*_seed_1_*")) / "wikicorpus_en")) == 2
    (folder / "wikicorpus_en/wikicorpus_en_training_1.txt").unlink()
    with pytest.raises(UserError, match="training_1.txt: no such file; 1 of the 3 text shards are missing"):
        stage("create_hdf5_files", *flags)


def test_text_shards_of_any_name_train_a_vocabulary_and_equal_names_are_refused(work):
    for folder in ("a", "b", "c/a"):
        write_documents(Path(folder, "corpus.txt").absolute(), [5] * 5)
    with pytest.raises(UserError, match="a/corpus.txt: 2 input files of this name are in folders of this name"):
        stage("sharding", "--input_files", "a", "c")
    stage("create_vocabulary", "--vocab_size", 60, "--input_files", "a/corpus.txt")
    assert len(load_vocabulary(next(work.glob("vocab/*/vocab.txt")))) > 30
    with pytest.raises(UserError, match="two of the 2 files have the same name"):
        stage("create_hdf5_files", "--input_files", "a/corpus.txt,b/corpus.txt")
    write_documents(Path("x_test_0.txt").absolute(), [5] * 5)
    with pytest.raises(UserError, match="x_test_0.txt: held-out text by its name"):
        stage("create_vocabulary", "--vocab_size", 61, "--input_files", "x_test_0.txt")


# the flags of the reference's create_pretraining_data.py


def test_defaults_that_the_reference_has_otherwise_are_said_where_they_are_used(work, capsys):
    write_vocabulary("vocab.txt")
    Path("t.txt").write_text("".join("\n".join(sentences(9, seed)) + "\n\n" for seed in range(9)))
    flags = ["--input_file=t.txt", "--output_file=t.hdf5", "--vocab_file=vocab.txt", "--do_lower_case"]
    create_pretraining_data.main(flags)
    printed = capsys.readouterr().out
    assert "--max_seq_length is not given: 512 here, 128 in the reference's" in printed
    assert "--dupe_factor is not given: 5 here, 10 in the reference's" in printed
    assert read_header("t.hdf5").sequence_length == 512
    create_pretraining_data.main([*flags, "--dynamic_masking", "--max-seq-length", "64"])
    printed = capsys.readouterr().out
    assert "--dupe_factor is not given: 1 here" in printed and "max_seq_length is not" not in printed
    assert "--max_predictions_per_seq is not given: 12 here, 20 in the reference's" in printed
    create_pretraining_data.main([*flags, "--dupe-factor=3", "--max_seq_length=64", "--max_predictions_per_seq=10"])
    assert "not given" not in capsys.readouterr().out
