"""Claims about one's own text: every format and compression gives the same lines; what is no text is refused."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from common.errors import UserError
from data import bertPrep
from data.preparation import corpus, formatting, near_duplicates, shard_numbers
from data.shards import Objective, find_shards
from tests.support.bad_servers import file_server, serving
from tests.support.preparation import ROOT, files_below, formatted, sentences

# U+2028 ends no line
LINES = ["Die See ist tief.\tAlte Schiffe fahren.", 'A "quoted", text; with signs.', "Море. 海很深。", "Fünf Möwen."]
TEXTS = ["Die See\nist\u2028tief.\n\nAlte Schiffe fahren.", LINES[1], LINES[2], LINES[3]]
COMPRESSORS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def stage(action: str, *flags, dataset: str = "mine") -> None:
    bertPrep.main(["--action", action, "--dataset", dataset, "--n_processes", "1", *map(str, flags)])


def record_of(work, dataset: str = "mine") -> dict:
    return json.loads((work / f"formatted_one_article_per_line/records/{dataset}.json").read_text())


def json_lines(texts, field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}, ensure_ascii=False) + "\n" for text in texts).encode()


def table(texts, delimiter: str, field: str = "text") -> bytes:
    with open("table", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows([["id", field], *([1, text] for text in texts)])
    return Path("table").read_bytes()


CONTENTS = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_lines,
            ".csv": lambda texts: table(texts, ","), ".tsv": lambda texts: table(texts, "\t")}


@pytest.mark.parametrize("ending", CONTENTS)
def test_every_format_gives_the_same_lines_in_every_compression(work, ending, monkeypatch):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 40)
    for compression, compress in COMPRESSORS.items():
        Path(f"t{ending}{compression}").write_bytes(compress(CONTENTS[ending](TEXTS)))
        stage("text_formatting", "--input_files", f"t{ending}{compression}")
        assert formatted(work, "mine") == LINES
    Path(f"u{ending}").write_bytes("\ufeff".encode() + CONTENTS[ending](TEXTS).replace(b"\n", b"\r\n"))
    Path("without_an_ending").write_bytes(CONTENTS[ending](TEXTS).decode().encode("utf-16"))
    stage("text_formatting", "--input_files", f"u{ending}")
    assert formatted(work, "mine")[1:] == LINES[1:]
    stage("text_formatting", "--input_files", "without_an_ending", "--input_format",
          ending[1:] if ending[1:] in ("csv", "tsv") else "jsonl")
    assert formatted(work, "mine") == LINES


def test_zstd_is_read_in_several_frames_and_a_cut_file_is_refused(work):
    zstandard = pytest.importorskip("zstandard")
    packed = b"".join(zstandard.compress(json_lines([text])) for text in TEXTS)
    Path("t.jsonl.zst").write_bytes(packed)
    stage("text_formatting", "--input_files", "t.jsonl.zst")
    assert formatted(work, "mine") == LINES
    Path("t.jsonl.zst").write_bytes(packed[:-9])
    with pytest.raises(UserError, match="t.jsonl.zst: damaged or cut short"):
        stage("text_formatting", "--input_files", "t.jsonl.zst")
    assert formatted(work, "mine") == LINES, "what was there stays"


def test_parquet_is_read_by_its_column_in_small_pieces(work, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(corpus, "BATCH_BYTES", 60)
    parquet.write_table(pyarrow.table({"n": range(5), "body": [*TEXTS, None]}), "t.parquet", row_group_size=4)
    stage("text_formatting", "--input_files", "t.parquet", "--text_field", "body")
    assert formatted(work, "mine") == LINES and record_of(work)["counts"]["empty"] == 1
    with pytest.raises(UserError, match="t.parquet: no 'text' among its columns n, body: name one with --text_field"):
        stage("text_formatting", "--input_files", "t.parquet")
    whole = Path("t.parquet").read_bytes()
    for spoilt in (whole[:-30], b"PAR1" + b"\xff" * 150 + whole[154:]):
        Path("bad.parquet").write_bytes(spoilt)
        with pytest.raises(UserError, match="bad.parquet: (no readable parquet file|damaged or cut short)"):
            stage("text_formatting", "--input_files", "bad.parquet", "--text_field", "body")
    Path("t.txt").write_bytes(Path("t.parquet").read_bytes())
    with pytest.raises(UserError, match="t.txt: parquet: name it .parquet, or give --input_format parquet"):
        stage("text_formatting", "--input_files", "t.txt")


@pytest.mark.parametrize(("package", "name", "content"), [
    ("pyarrow", "t.parquet", b"PAR1"), ("zstandard", "t.txt.zst", b"\x28\xb5\x2f\xfd")])
def test_a_package_that_is_not_installed_is_named(work, monkeypatch, package, name, content):
    monkeypatch.setitem(sys.modules, package, None)
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: .*\(pip install {package}\)"):
        stage("text_formatting", "--input_files", name)


def test_a_folder_of_all_kinds_of_files_is_read_and_a_long_file_is_cut(work, monkeypatch):
    monkeypatch.setattr(corpus, "LONGEST_DOCUMENT", 60)
    Path("texts/more").mkdir(parents=True)
    Path("texts/a.txt.gz").write_bytes(gzip.compress(TEXTS[0].encode()))
    Path("texts/long.txt").write_text("\n\n".join(paragraphs := sentences(20)))
    Path("texts/more/B.JSONL").write_bytes(json_lines(TEXTS[1:]))
    Path("texts/._a.txt").write_bytes(b"\0\5")
    Path("texts/cover.pdf").write_bytes(b"%PDF")
    stage("text_formatting", "--input_files", "texts")
    lines = formatted(work, "mine")
    assert sorted(lines)[0] and set(LINES) < set(lines) and len(lines) > 8
    assert "\t".join(line for line in lines if line not in LINES).split("\t") == paragraphs
    Path("wide.txt").write_text("ü" * 200)
    stage("text_formatting", "--input_files", "wide.txt")
    assert "".join(formatted(work, "mine")) == "ü" * 200


@pytest.mark.parametrize(("name", "content", "said"), [
    ("t.txt", json_lines(TEXTS), "JSON lines: name it .jsonl, or give --input_format jsonl"),
    ("t.txt", b'[{"text": "a"},\n {"text": "b"}]', "JSON: write one object a line"),
    ("t.txt", b"<mediawiki>\n<page>", "a Wikipedia dump: --dataset wikicorpus_XX"),
    ("t.txt", b"<!DOCTYPE html><html>", "an HTML page"), ("t.txt", b"%PDF-1.4", "a PDF: convert it"),
    ("t.txt", b"PK\x03\x04docx", "a zip archive, or an office document"), ("t.txt", b"some\0bytes", "a NUL byte"),
    ("t.txt.gz", gzip.compress(b"%PDF-1.4", mtime=0), "a PDF"),
    ("t.txt", "the sea".encode("utf-16-le"), "iconv -f UTF-16LE"),
    ("t.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "damaged or cut short"),
    ("t.txt", "Он родился в Москве и долго жил там у моря. ".encode("cp1251") * 9, "not UTF-8 .*iconv -f "),
    ("t.jsonl", b"just text\n", "no JSON object in its first line: is it plain text"),
    ("t.jsonl", b'[{"text": "a"}]\n', "a JSON array"), ("t.jsonl", b'{\n "text": "a"\n}\n', "jq -c ."),
    ("t.jsonl", json_lines(TEXTS, "body"), "no 'text' among its fields id, body: name one with --text_field"),
    ("t.tsv", b'id\ttext\n1\t"Open quote\n2\tnext\n', "no tsv file .* a field that begins with a quote"),
    ("t.csv", b"id,body\n1,x\n", "no 'text' among its columns id, body"),
    ("t.parquet", b"text", "no parquet file by its first bytes"), ("t.dat", b"text", "its ending is none of .txt"),
    ("t.jsonl", json_lines(TEXTS) * 9 + b'{"text": "cut\n' * 9, "9 of 45 documents are not what they should be"),
    ("t.jsonl", json_lines(TEXTS) * 9 + b'{"text": "\xfc"}\n' * 9, "9 of 45 documents .* 9 not utf8"),
    ("t.jsonl", json_lines(TEXTS) * 9 + b'{"other": "x"}\n' * 9, "9 of 45 documents .* 9 without the field"),
])
def test_what_is_no_text_is_refused_with_the_way_to_read_it(work, name, content, said):
    Path(name).write_bytes(content)
    with pytest.raises(UserError, match=f"(?s){said}"):
        stage("text_formatting", "--input_files", name)
    assert not formatted(work, "mine")


def test_a_few_bad_files_and_lines_are_skipped_counted_and_listed(work, capsys):
    Path("texts").mkdir()
    for number in range(60):
        Path(f"texts/{number:02d}.txt").write_text(f"Text {number}.")
    Path("texts/07.txt").write_bytes(b"\0\1\2")
    Path("texts/08.txt").write_bytes("Ein Süß-Wörtchen".encode("latin-1"))
    Path("texts/09.txt").write_text(" \n")
    Path("texts/lines.jsonl").write_bytes(json_lines([f"Line {number}." for number in range(60)]) + b"{\n")
    stage("text_formatting", "--input_files", "texts")
    printed = capsys.readouterr().out
    assert "117 documents, 1 empty, 1 not json, 2 skipped files" in printed
    assert "skipped 07.txt: a NUL byte" in printed and "skipped 08.txt: not UTF-8" in printed
    assert len(record_of(work)["skipped"]) == 3 and len(formatted(work, "mine")) == 117


def test_filters_and_duplicates_are_counted_and_recorded_also_after_an_interruption(work, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 60)
    monkeypatch.setattr(formatting, "BATCHES_PER_PART", 2)
    texts = [f"Many words of text {chr(97 + number)}." for number in range(12)]
    texts += [texts[3].upper(), "  " + texts[5].replace(" ", "\n"), "12 34 56 78 90 !", "हिन्दी में भी यह है।",
              "Too short."]
    Path("t.jsonl").write_bytes(json_lines(texts))
    flags = ("--input_files", "t.jsonl", "--deduplicate", "--min_words", 4, "--min_letters", 0.5)
    stage("text_formatting", *flags)
    said = "1 below --min_letters, 1 below --min_words, 13 documents, 2 duplicates"
    assert said in capsys.readouterr().out and formatted(work, "mine") == [*texts[:12], texts[15]]
    whole, parts = formatted(work, "mine"), sorted(work.glob("formatted_*/mine/*.txt"))
    (work / "formatted_one_article_per_line/records/mine.json").unlink()
    parts[-1].write_text("cut sho")
    parts[-2].unlink()
    stage("text_formatting", *flags)
    assert said in capsys.readouterr().out and formatted(work, "mine") == whole and len(parts) > 4
    assert record_of(work)["options"]["deduplicate"] is True and record_of(work)["counts"]["duplicates"] == 2
    stage("text_formatting", "--input_files", "t.jsonl")
    assert len(formatted(work, "mine")) == 17 and "made of other files or with other flags" in capsys.readouterr().out


def changed(text: str, *places: int) -> str:
    words = text.split(" ")
    return " ".join("new" if place in places else word for place, word in enumerate(words))


def test_near_duplicates_are_dropped_counted_and_listed_also_after_an_interruption(work, monkeypatch, capsys):
    monkeypatch.setattr(corpus, "BATCH_BYTES", 700)
    monkeypatch.setattr(formatting, "BATCHES_PER_PART", 2)
    random, letters = Random(1), "abcdefgh"
    texts = [" ".join("".join(random.choices(letters, k=4)) for _ in range(60)) for _ in range(12)]
    chinese = "".join(chr(0x4e00 + random.randrange(999)) for _ in range(80))
    texts += [chinese, "Too short.", "Too short?", "Two words"]
    texts += [changed(text, 9, 19, 29, 49) for text in texts[4:11]]  # share 65 % of their runs, and some a band
    near = [changed(texts[2], 30), texts[3].upper() + " more.", changed(texts[11], 1, 55), chinese[:40] + chinese[41:],
            texts[5], changed(changed(texts[2], 30), 59)]
    Path("t.jsonl").write_bytes(json_lines([*texts, *near, texts[0] + " end"]))
    flags = ("--input_files", "t.jsonl", "--deduplicate", "near")
    stage("text_formatting", *flags)
    said = "23 documents, 7 near duplicates"
    assert said in capsys.readouterr().out and formatted(work, "mine") == texts
    lists = sorted(work.glob("formatted_*/mine/part_*.near_duplicates.tsv"))
    listed = [line.split("\t") for path in lists for line in path.read_text().splitlines()]
    assert [number for _, number, _ in listed] == ["3", "4", "12", "13", "6", "3", "1"], "of the documents kept"
    assert [begin for *_, begin in listed] == [text[:100] for text in [*near, texts[0] + " end"]]
    assert all(0.8 <= float(share) <= 1 for share, *_ in listed) and listed[4][0] == "1.00"

    before = files_below(work)
    (work / "formatted_one_article_per_line/records/mine.json").unlink()
    for path in [*lists[-1:], *sorted(work.glob("formatted_*/mine/part_*.txt"))[-2:]]:
        path.unlink()
    stage("text_formatting", *flags)
    assert said in capsys.readouterr().out and files_below(work) == before
    stage("text_formatting", "--input_files", "t.jsonl", "--deduplicate", "exact")
    assert "29 documents, 1 duplicates" in capsys.readouterr().out
    assert not list(work.glob("formatted_*/mine/*.tsv"))
    monkeypatch.setitem(sys.modules, "datasketch", None)
    near_duplicates.empty_signature.cache_clear()
    with pytest.raises(UserError, match="--deduplicate near: needs datasketch, which is not installed"):
        stage("text_formatting", *flags)
    assert len(formatted(work, "mine")) == 29
    with pytest.raises(SystemExit):
        stage("text_formatting", "--input_files", "t.jsonl", "--deduplicate", "nearly")


def test_two_corpora_lie_side_by_side_and_every_stage_finds_what_the_one_before_made(work, monkeypatch):
    monkeypatch.setattr(shard_numbers, "SHARD_BYTES", 4000)
    made = {}
    for name, count in (("mine", 20), ("yours-2", 80)):
        Path(f"{name}.jsonl").write_bytes(json_lines(" ".join(sentences(9, seed)) for seed in range(count)))
        stage("text_formatting", "--input_files", f"{name}.jsonl", dataset=name)
        stage("sharding", dataset=name)
        stage("create_vocabulary", "--vocab_size", 80, dataset=name)
        stage("create_hdf5_files", "--max_seq_length", 32, "--dupe_factor", 1, dataset=name)
        assert made.items() <= (made := files_below(work)).items()
    assert [len(list(work.glob(f"hdf5_*/{name}/*_{split}_*"))) for name in ("mine", "yours-2")
            for split in ("training", "test")] == [1, 1, 6, 1]
    assert len(formatted(work, "mine")) == 20 and len(formatted(work, "yours-2")) == 80


def test_the_numbers_of_shards_that_were_typed_are_found_and_two_are_asked_about(work):
    Path("t.txt").write_text("".join(" ".join(sentences(9, seed)) + "\n" for seed in range(40)))
    stage("sharding", "--input_files", "t.txt", "--n_training_shards", 3, "--n_test_shards", 2)
    stage("create_vocabulary", "--vocab_size", 80)
    stage("create_hdf5_files", "--max_seq_length", 32, "--dupe_factor", 1)
    assert len(list(work.glob("hdf5_*/mine/*.hdf5"))) == 5
    stage("sharding", "--input_files", "t.txt")
    with pytest.raises(UserError, match=r"shards in several numbers, \(1, 1\), \(3, 2\): say which with"):
        stage("create_hdf5_files")


def test_shards_of_an_earlier_text_are_passed_over(work):
    for count in (30, 60):
        Path("t.jsonl").write_bytes(json_lines(" ".join(sentences(9, seed)) for seed in range(count)))
        stage("text_formatting", "--input_files", "t.jsonl")
        stage("sharding", *(("--n_training_shards", 2) if count == 30 else ()))
    stage("create_vocabulary", "--vocab_size", 80)
    stage("create_hdf5_files", "--max_seq_length", 32, "--dupe_factor", 1)
    assert len(list(work.glob("hdf5_*/mine/*.hdf5"))) == 2


@pytest.mark.parametrize(("name", "said"), [
    ("my corpus", "letters, digits, - and _"), ("../up", "letters, digits"), ("latest_news", "choose another name"),
    ("my_training", "choose another name"), ("records", "choose another"), ("x_cased", "choose another"),
    ("bokscorpus", "no built-in data set; name the files")])
def test_names_that_would_mix_up_files_are_refused(work, name, said):
    with pytest.raises(UserError, match=said):
        stage("text_formatting", dataset=name)


def test_a_trained_vocabulary_is_described_and_googles_is_not_taken_for_other_languages(work, capsys):
    Path("t.txt").write_text("".join("Das Meer ist tief und alt. Schiffe fahren.\n" * 20))
    stage("sharding", "--input_files", "t.txt", "--language", "de")
    with pytest.raises(UserError, match="the text's language is de: give --vocab_file, or train one with --action cre"):
        stage("create_hdf5_files", "--language", "de")
    capsys.readouterr()
    flags = ("--vocab_size", 60, "--unused_tokens", 4, "--do_lower_case", 0)
    for _ in range(2):
        stage("create_vocabulary", *flags)
        printed = capsys.readouterr().out
        assert "create_vocabulary: 60 tokens in " in printed
        assert "text: 0.0% of the tokens are [UNK], " in printed and " pieces a word, " in printed
    assert (work / "vocab/mine_cased/vocab.txt").read_text().split()[5:9] == [f"[unused{n}]" for n in range(4)]
    stage("create_hdf5_files", "--language", "de", "--do_lower_case", 0, "--max_seq_length", 32)
    assert "(60 tokens)" in capsys.readouterr().out


def test_own_text_needs_no_download_and_its_stages_say_what_comes_first(work):
    with pytest.raises(UserError, match="needs no download"):
        stage("download")
    with pytest.raises(UserError, match="run --action sharding --dataset mine first"):
        stage("create_hdf5_files")


def test_text_is_read_from_a_url_under_its_own_ending(work, monkeypatch, tmp_path):
    monkeypatch.setenv("BERT_CACHE_DIR", str(tmp_path / "cache"))
    with serving(file_server(gzip.compress(json_lines(TEXTS)))) as server:
        stage("text_formatting", "--input_files", f"{server.url}/some/t.jsonl.gz?download=true")
    assert formatted(work, "mine") == LINES


def test_the_script_makes_samples_of_both_lengths_from_a_folder(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/t.jsonl.gz").write_bytes(gzip.compress(json_lines(
        (" ".join(sentences(30, seed)) for seed in range(40)), "body")))
    outcome = subprocess.run(
        ["bash", str(ROOT / "data/create_datasets_from_start.sh"), "corpus", "mine", "texts", "--text_field", "body",
         "--vocab_size", "90", "--masked_lm_prob", "0.4", "--whole_word_mask", "--no_nsp"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"BERT_PREP_WORKING_DIR": str(tmp_path / "work"), "N_PROCESSES": "2", "DYNAMIC_MASKING": "1",
                          "PYTHON": sys.executable})
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    found = sorted(tmp_path.glob("work/hdf5_*/mine"))
    assert len(found) == 2 and all(sum(shard.rows for shard in find_shards(folder)) > 9 for folder in found)
    assert [find_shards(folder)[0].prediction_slots for folder in found] == [52, 208]
    assert {find_shards(folder)[0].objective for folder in found} == {Objective(nsp=False, whole_word_mask=True)}
