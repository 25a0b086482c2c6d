"""Claims about each stage of data preparation on tiny, odd and bad input."""

import bz2
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.download import file_checksum
from common.errors import UserError
from data import bertPrep
from data.preparation import archives, books, downloads, formatting, sentences, sharding, wikipedia
from data.shards import find_shards, read_header
from tests.support.bad_servers import file_server, serving
from tests.support.preparation import (
    ROOT,
    SAMPLE,
    command,
    files_below,
    page,
    prepare,
    write_documents,
    write_dump,
    write_vocabulary,
)
from tests.support.preparation import sentences as some_sentences

ENGLISH = "Ships sail far out. The sea is deep!\n\nGulls cry, e.g. in the wind. Dr. Old is No. 1"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    monkeypatch.setenv("BERT_PREP_WORKING_DIR", str(tmp_path / "work"))
    return tmp_path / "work"


def stage(action: str, *flags, dataset: str = "wikicorpus_en") -> None:
    """Run a stage in this process."""
    bertPrep.main(["--action", action, "--dataset", dataset, "--n_processes", "1", *map(str, flags)])


def lines_of(folder: Path, dataset: str = "wikicorpus_en") -> list[str]:
    return [line for path in sorted((folder / "formatted_one_article_per_line" / dataset).glob("part_*.txt"))
            for line in path.read_text().splitlines()]


# text_formatting


def test_only_articles_with_text_become_lines(folder, tmp_path, capsys):
    dump = write_dump(tmp_path / "x-pages-articles.xml.bz2", [
        page("Sea", "'''Sea''' is [[water|deep water]] & more.{{cite|x}}<ref>no</ref>\n\n== Ships ==\nOld  ships."),
        page("Ocean", "#REDIRECT [[Sea]]", redirect=True),
        page("Talk:Sea", "No article.", namespace=1),
        page("Template:Cite", "{{{1}}} no article", namespace=10),
        page("List", "* one\n* two"),
        page("Kill Bill: Volume 1", "A film.", namespace=0),
        page("Broken", b"bytes \xff\xfe that are no UTF-8"),
        page("Today", "The year is {{CURRENTYEAR}} now."),
        page("Nothing", ""),
        page("Signs", b"It&#039;s &quot;1 &amp;lt; 2&quot;, &lt;b&gt;AT&amp;amp;T&lt;/b&gt; and &amp;amp;lt;."),
    ])
    stage("text_formatting", "--input_files", dump)
    assert lines_of(folder) == ["Sea is deep water & more.\tShips.\tOld ships.", "A film.", "The year is now.",
                                "It's \"1 < 2\", AT&T and &lt;."]
    printed = capsys.readouterr().out
    assert "4 documents, 2 empty, 1 not utf8, 2 other namespaces, 1 redirects" in printed
    assert "skipped Broken: not_utf8" in printed


def test_formatting_goes_on_after_the_parts_that_are_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "BATCH_BYTES", 300)
    monkeypatch.setattr(formatting, "BATCHES_PER_PART", 2)
    dump = write_dump(tmp_path / "x-pages-articles.xml.bz2",
                      [page(f"T{number}", " ".join(some_sentences(3, number))) for number in range(20)])
    stage("text_formatting", "--input_files", dump)
    whole = files_below(folder)
    parts = sorted(folder.glob("formatted_*/wikicorpus_en/part_*.txt"))
    assert len(parts) > 3 and len(lines_of(folder)) == 20
    (folder / "formatted_one_article_per_line/records/wikicorpus_en.json").unlink()
    parts[2].write_text("cut sho")
    kept = {path: path.stat().st_mtime_ns for path in parts}
    stage("text_formatting", "--input_files", dump)
    assert files_below(folder) == whole
    assert [path.name for path in parts if path.stat().st_mtime_ns != kept[path]] == [parts[2].name]


def test_a_dump_of_many_streams_gives_what_one_stream_gives(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wikipedia, "STREAM_BYTES", 700)
    pages = [page(f"T{number}", " ".join(some_sentences(4, number))) for number in range(40)]
    stage("text_formatting", "--input_files", write_dump(tmp_path / "x.xml.bz2", pages))
    one = lines_of(folder)
    streams = [bz2.compress(b"".join(pages[start:start + 3])) for start in range(0, 40, 3)]
    many = tmp_path / "many.xml.bz2"
    many.write_bytes(bz2.compress(b"<mediawiki>\n") + b"".join(streams) + bz2.compress(b"</mediawiki>\n"))
    assert len(list(wikipedia.dump_batches([many]))) > 5 and wikipedia.is_multistream(many)
    for dumps in ([many, many], [tmp_path / "x.xml.bz2"]):
        sizes = []
        list(wikipedia.dump_batches(dumps, sizes.append))
        assert sum(sizes) == sum(path.stat().st_size for path in dumps), "the progress bar ends at 100 %"
    stage("text_formatting", "--input_files", many)
    assert lines_of(folder) == one and len(one) == 40
    many.write_bytes(many.read_bytes()[:-60])
    with pytest.raises(UserError, match="damaged or cut short"):
        stage("text_formatting", "--input_files", many)
    many.write_bytes(many.read_bytes()[:1500] + b"rubbish" + many.read_bytes()[1507:])
    with pytest.raises(UserError, match="damaged or cut short"):
        stage("text_formatting", "--input_files", many)


def test_a_smaller_dump_leaves_no_part_of_the_larger_one(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "BATCH_BYTES", 300)
    monkeypatch.setattr(formatting, "BATCHES_PER_PART", 1)
    for count in (9, 2):
        dump = write_dump(tmp_path / "x-pages-articles.xml.bz2",
                          [page(f"T{number}", some_sentences(1, number)[0]) for number in range(count)])
        stage("text_formatting", "--input_files", dump)
        assert len(lines_of(folder)) == count


@pytest.mark.parametrize("content, message", [
    (bz2.compress(page("A", "Text. " * 5000))[:-20], "damaged or cut short"),
    (b"this is no bz2", "damaged or cut short"),
    (bz2.compress(b"<html>no dump</html>"), "no </page> in it"),
    (bz2.compress(b"<page>" + b"x" * 90_000), "xml.bz2: no </page> in 9"),
])
def test_a_bad_dump_is_named_and_what_was_there_stays(folder, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(wikipedia, "LONGEST_PAGE", 50_000)
    good = write_dump(tmp_path / "x-pages-articles.xml.bz2", [page("A", "Good text.")])
    stage("text_formatting", "--input_files", good)
    (tmp_path / "bad.xml.bz2").write_bytes(content)
    with pytest.raises(UserError, match=message):
        stage("text_formatting", "--input_files", tmp_path / "bad.xml.bz2")
    assert lines_of(folder) == ["Good text."]


def test_a_dump_without_articles_is_an_error_and_nothing_goes_on_from_it(folder, tmp_path):
    dump = write_dump(tmp_path / "x-pages-articles.xml.bz2", [page("A", "Talk", namespace=1)])
    with pytest.raises(UserError, match="no document with text in it"):
        stage("text_formatting", "--input_files", dump)
    with pytest.raises(UserError, match="run --action text_formatting"):
        stage("sharding")


def test_what_wikiextractors_command_wrote_is_read_too(folder, tmp_path):
    extracted = folder / "extracted/wikicorpus_en/AA/wiki_00"
    extracted.parent.mkdir(parents=True)
    extracted.write_text('<doc id="1" url="u" title="Sea">\nSea\n\nThe sea &amp; ships.\nOld.\n\n</doc>\n'
                         '<doc id="2" url="u" title="Empty">\nEmpty\n\n</doc>\n')
    stage("text_formatting", "--skip_wikiextractor", 1)
    assert lines_of(folder) == ["The sea & ships.\tOld."]


def test_books_become_lines_and_bad_books_are_listed(folder, tmp_path, capsys):
    shelf = tmp_path / "books"
    (shelf / "more").mkdir(parents=True)
    (shelf / "a.txt").write_bytes(b"\xef\xbb\xbfFirst line\r\nsecond line.\r\n\r\nNew  paragraph.\r\n")
    (shelf / "more" / "b.txt").write_text("Another book.")
    (shelf / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (shelf / "binary.txt").write_bytes(b"a\0b")
    (shelf / "empty.txt").write_text(" \n")
    (shelf / "cover.jpg").write_bytes(b"no book")
    (shelf / "long.txt").write_text(long := " ".join(some_sentences(900)))
    stage("text_formatting", "--input_files", shelf, dataset="bookscorpus")
    assert lines_of(folder, "bookscorpus") == ["First line second line.\tNew paragraph.", long, "Another book."]
    printed = capsys.readouterr().out
    assert "3 documents, 3 skipped" in printed
    assert f"writes about {len(long) / 1000:.2g}" in printed, "books become about as much text as they hold"
    for book in ("bad.txt: cannot be read", "binary.txt: binary", "empty.txt: empty"):
        assert f"skipped {book}" in printed


@given(st.lists(st.integers(0, 3 << 19), max_size=6))
@settings(max_examples=20, deadline=None)
def test_batches_hold_every_book_once(sizes):
    class Book:
        def __init__(self, size):
            self.size = size

        def stat(self):
            return os.stat_result((0,) * 6 + (self.size,) + (0,) * 3)

    shelf = [Book(size) for size in sizes]
    read = []
    batches = [batch for batch, in books.book_batches(shelf, read.append)]
    assert [book for batch in batches for book in batch] == shelf and sum(read) == sum(sizes)
    assert all(sum(book.size for book in batch[:-1]) < books.BATCH_BYTES for batch in batches)


# sentences


def test_abbreviations_do_not_end_sentences_but_tabs_do():
    line = wikipedia.one_line(ENGLISH.split("\n\n"))
    expected = ["Ships sail far out.", "The sea is deep!", "Gulls cry, e.g. in the wind.", "Dr. Old is No. 1", "here."]
    assert sentences.split_document(line + "\there.", "punkt") == expected
    assert len(sentences.split_document(line + "\there.", "nltk")) == len(expected) + 2, "e.g. and No. end sentences"


@given(st.text(alphabet="ab .!?\t", max_size=200), st.integers(3, 50))
@settings(deadline=None)
def test_sentences_keep_every_character_however_long_the_line(text, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentences, "LONGEST_PIECE", longest)
        split = sentences.split_document(text, "punkt")
    assert "".join("".join(sentence.split()) for sentence in split) == "".join(text.split())


def test_a_splitter_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    sentences.splitter.cache_clear()
    with pytest.raises(UserError, match="--segmentation_method sentencex: package not installed"):
        sentences.splitter("sentencex", "bg")


# sharding


@pytest.mark.parametrize("order", [lambda sizes: sizes, np.sort], ids=["any order", "longest last"])
def test_100_000_documents_over_64_shards_are_level(order):
    sizes = order(np.random.default_rng(5).lognormal(2.5, 1.0, 100_000).astype(int) + 1)
    assignment = sharding.ShardAssignment(64, 64, 0.1)
    for start in range(0, len(sizes), 30_000):
        assignment.assign(sizes[start:start + 30_000].tolist(), last=start + 30_000 >= len(sizes))
    training, test = assignment.sentences[:64], assignment.sentences[64:]
    assert max(training) / min(training) <= 1.05 and max(test) / min(test) <= 1.05
    assert abs(sum(test) / sizes.sum() - 0.1) < 0.01 * 0.1


@given(st.lists(st.integers(1, 500), min_size=1, max_size=200), st.integers(1, 5), st.integers(1, 5),
       st.floats(0.05, 0.95))
@settings(deadline=None)
def test_no_shard_is_ahead_of_another_by_more_than_a_document(sizes, training, test, fraction):
    assignment = sharding.ShardAssignment(training, test, fraction)
    placed = assignment.assign(sizes, last=True)
    assert [sum(size for size, shard in zip(sizes, placed, strict=True) if shard == number)
            for number in range(training + test)] == assignment.sentences
    for group in (assignment.sentences[:training], assignment.sentences[training:]):
        assert max(group) - min(group) <= max(sizes)
    if len(sizes) >= training + test:
        assert min(assignment.sentences) > 0
    if len(sizes) > 4 * (training + test) / min(fraction, 1 - fraction):
        assert abs(sum(assignment.sentences[training:]) - fraction * sum(sizes)) <= max(sizes)


@given(st.lists(st.integers(1, 40), max_size=60))
def test_windows_keep_the_documents_in_order_and_the_last_is_never_a_small_rest(sizes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "WINDOW_BYTES", 50)
        windows, last = zip(*sharding.windows(("x" * size, number) for number, size in enumerate(sizes)), strict=True)
    assert last == (False,) * (len(windows) - 1) + (True,)
    assert [number for window in windows for _, number in window] == list(range(len(sizes)))
    weights = [sum(len(text) for text, _ in window) for window in windows]
    assert max(weights) <= 100 + 40
    if len(windows) > 1:
        assert weights[-1] >= 50 - 40


def test_too_few_documents_are_an_error_and_the_old_shards_stay(folder, tmp_path):
    flags = ("--n_training_shards", 3, "--n_test_shards", 2, "--fraction_test_set", 0.3)
    stage("sharding", "--input_files", write_documents(tmp_path / "good.txt", [4] * 20), *flags)
    before = {name: content for name, content in files_below(folder).items() if name.endswith(".txt")}
    with pytest.raises(UserError, match="4 documents are too few for 3 training and 2 test shards"):
        stage("sharding", "--input_files", write_documents(tmp_path / "few.txt", [4] * 4), *flags)
    assert {name: content for name, content in files_below(folder).items() if name.endswith(".txt")} == before
    assert len(before) == 5


def test_empty_broken_and_one_sentence_documents_are_counted(folder, tmp_path, capsys):
    path = tmp_path / "odd.txt"
    path.write_bytes(b"\n \t \nOne sentence only.\nNot \xff UTF-8.\nTwo. Sentences.\n\nLast without an end of line")
    stage("sharding", "--input_files", path, "--n_training_shards", 2, "--n_test_shards", 1)
    assert "3 documents, 1 documents not utf8, 1 empty documents, 4 sentences" in capsys.readouterr().out


@pytest.mark.slow
def test_a_document_of_50_mb_on_one_line_goes_through_all_stages(folder, tmp_path):
    line = " ".join(some_sentences(50)) + " "
    path = tmp_path / "long.txt"
    path.write_text(line * 100 + "no end " * 7_200_000 + "\n" + "Another one. Small. " * 5 + "\nA third.\n")
    flags = ("--n_training_shards", 2, "--n_test_shards", 1)
    prepare(folder, "sharding", "--input_files", path, *flags, "--n_processes", 1, dataset="wikicorpus_en")
    prepare(folder, "create_hdf5_files", "--vocab_file", write_vocabulary(tmp_path / "vocab.txt"), *flags,
            "--dupe_factor", 1, "--n_processes", 1, dataset="wikicorpus_en")
    assert max(shard.rows for shard in find_shards(next(folder.glob("hdf5_*")) / "wikicorpus_en")) > 50


# create_hdf5_files


@pytest.fixture
def sharded(folder, tmp_path) -> tuple:
    """A working folder with three text shards; yields the flags that name them and the vocabulary."""
    flags = ("--n_training_shards", 2, "--n_test_shards", 1)
    stage("sharding", "--input_files", write_documents(tmp_path / "t.txt", [9] * 12), *flags)
    return (*flags, "--vocab_file", write_vocabulary(tmp_path / "vocab.txt"), "--max_seq_length", 32)


def hdf5_files(folder) -> dict[str, bytes]:
    return {name: content for name, content in files_below(folder).items() if name.endswith(".hdf5")}


def test_other_seeds_options_and_words_give_other_shards_in_their_own_place(folder, sharded):
    stage("create_hdf5_files", *sharded)
    first = hdf5_files(folder)
    stage("create_hdf5_files", *sharded, "--random_seed", 1)
    both = hdf5_files(folder)
    assert len(first) == 3 and len(both) == 6
    assert all(both[name] == content for name, content in first.items())
    assert len(set(both.values())) == 6


def test_only_what_changed_is_made_again(folder, sharded, tmp_path):
    stage("create_hdf5_files", *sharded)
    path = next(folder.glob("hdf5_*/wikicorpus_en/*_training_1.hdf5"))
    kept = {other: other.stat().st_mtime_ns for other in path.parent.glob("*.hdf5")}
    whole = files_below(folder)
    path.unlink()
    stage("create_hdf5_files", *sharded)
    assert files_below(folder) == whole
    assert [other for other in kept if other.stat().st_mtime_ns != kept[other]] == [path]
    (tmp_path / "vocab.txt").write_text((tmp_path / "vocab.txt").read_text() + "harbour\n")
    stage("create_hdf5_files", *sharded)
    assert all(other.stat().st_mtime_ns != kept[other] for other in kept)


def test_fewer_shards_leave_none_of_the_earlier_ones(folder, sharded, tmp_path):
    stage("create_hdf5_files", *sharded)
    fewer = ("--n_training_shards", 1, "--n_test_shards", 1)
    stage("sharding", "--input_files", tmp_path / "t.txt", *fewer)
    stage("create_hdf5_files", *sharded, *fewer)
    assert sorted(Path(name).name for name in hdf5_files(folder)) == ["wikicorpus_en_test_0.hdf5",
                                                                      "wikicorpus_en_training_0.hdf5"]


def test_a_full_disk_ends_in_one_line_and_finished_shards_stay_whole(folder, sharded):
    stage("create_hdf5_files", *sharded)
    small = hdf5_files(folder)
    largest = max(map(len, small.values()))

    def limit_file_size():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest * 2, largest * 2))

    for processes in ("1", "2"):
        outcome = subprocess.run(
            command("create_hdf5_files", *sharded, "--dupe_factor", 50, "--n_processes", processes,
                    dataset="wikicorpus_en"),
            cwd=ROOT, env=os.environ, preexec_fn=limit_file_size, capture_output=True, text=True, check=False)
        assert outcome.returncode == 2 and "Traceback" not in outcome.stderr
        assert "File too large; finished files are kept" in outcome.stderr
    left = hdf5_files(folder)
    assert left.items() >= small.items()
    assert all(read_header(folder / name).rows for name in left)


def test_a_shard_that_is_not_utf8_a_missing_file_and_no_vocabulary_are_named(folder, sharded, tmp_path):
    bad = tmp_path / "bad_training_0.txt"
    bad.write_bytes(b"fine\n\n\xff\n")
    for flags, message in (((*sharded, "--input_files", bad), "bad_training_0.txt: not UTF-8"),
                           ((*sharded, "--input_files", tmp_path / "none.txt"), "none.txt: no such file"),
                           ((*sharded, "--max_seq_length", 4), "--max_seq_length 4: two segments"),
                           ((*sharded[:-3], tmp_path / "none"), "--vocab_file .*none: cannot be read"),
                           ((*sharded[:-4], "--do_lower_case", 0), "--do_lower_case 0: Google's vocabulary")):
        with pytest.raises(UserError, match=message):
            stage("create_hdf5_files", *flags)


def test_stages_out_of_order_say_what_to_run_first(folder):
    for action, before in (("text_formatting", "download"), ("sharding", "text_formatting"),
                           ("create_hdf5_files", "sharding")):
        with pytest.raises(UserError, match=f"run --action {before} --dataset wikicorpus_en first"):
            stage(action, "--n_training_shards", 1)


# download


def wikimedia(root: Path, dump: Path, date: str = "20260101") -> list[str]:
    """A mirror of dumps.wikimedia.org as a folder with one dump; returns the flags that name it."""
    name = f"enwiki-{date}-pages-articles-multistream.xml.bz2"
    (root / "latest").mkdir(parents=True, exist_ok=True)
    (root / date).mkdir(exist_ok=True)
    (root / date / name).write_bytes(dump.read_bytes())
    sums = f"{'0' * 40}  enwiki-{date}-pages-articles.xml.bz2\n{file_checksum(dump, 'sha1')}  {name}\n"
    for folder, day in (("latest", "latest"), (date, date)):
        (root / folder / f"enwiki-{day}-sha1sums.txt").write_text(sums)
    return ["--mirror", f"{wikipedia.DUMPS}/enwiki", str(root)]


@pytest.fixture
def dump(tmp_path) -> Path:
    return write_dump(tmp_path / "dump.xml.bz2", [page(f"T{number}", " ".join(some_sentences(8, number)))
                                                  for number in range(12)])


def test_the_newest_dump_is_found_verified_and_kept(folder, tmp_path, dump):
    stage("download", *wikimedia(tmp_path / "mirror", dump))
    target = folder / "download/wikicorpus_en/enwiki-20260101-pages-articles-multistream.xml.bz2"
    assert target.read_bytes() == dump.read_bytes()
    stage("download", *wikimedia(tmp_path / "mirror", dump, "20260201"))
    assert len(list(target.parent.glob("*.bz2"))) == 1, "an interrupted download goes on with its own dump"
    stage("download", *wikimedia(tmp_path / "mirror", dump, "20260201"), "--dump_date", "20260201")
    assert len(list(target.parent.glob("*.bz2"))) == 2


def test_a_dump_that_is_not_what_wikimedia_says_gets_no_name(folder, tmp_path, dump):
    flags = wikimedia(tmp_path / "mirror", dump)
    (tmp_path / "mirror/20260101/enwiki-20260101-pages-articles-multistream.xml.bz2").write_bytes(b"something else")
    with pytest.raises(UserError, match="sha1 is .* expected"):
        stage("download", *flags)
    assert not list(folder.rglob("*.bz2"))


def test_mirrors_of_the_environment_and_of_http_are_used(folder, tmp_path, dump, monkeypatch):
    wikimedia(tmp_path / "mirror", dump)

    def answer(path, headers):
        file = tmp_path / "mirror" / path.removeprefix("/wiki/")
        return file_server(file.read_bytes())(path, headers) if file.is_file() else (404, {"Content-Length": "0"}, b"")

    with serving(answer) as server:
        monkeypatch.setenv(downloads.MIRRORS_VARIABLE, f"{wikipedia.DUMPS}/enwiki {server.url}/wiki")
        stage("download")
    assert len(list(folder.rglob("enwiki-20260101-pages-articles-multistream.xml.bz2"))) == 1
    monkeypatch.setenv(downloads.MIRRORS_VARIABLE, "one two three")
    with pytest.raises(UserError, match="3 words, expected pairs"):
        stage("download", "--dump_date", "20260101")


def google_archive(path: Path, vocabulary: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (("bert_model.ckpt.data", os.urandom(4_000_000)), ("vocab.txt", vocabulary),
                              ("bert_config.json", b"{}")):
            file.writestr(f"{downloads.GOOGLE_NAME}/{name}", content)
    return path


@pytest.mark.parametrize("ranges", [True, False])
def test_googles_vocabulary_is_read_out_of_its_archive(folder, tmp_path, monkeypatch, ranges):
    vocabulary = write_vocabulary(tmp_path / "vocab.txt").read_bytes()
    archive = google_archive(tmp_path / "weights.zip", vocabulary).read_bytes()
    monkeypatch.setattr(downloads, "GOOGLE_SHA256", hashlib.sha256(vocabulary).hexdigest())
    sent = []
    answer = file_server(archive, ranges)

    def counted(path, headers):
        reply = answer(path, headers)
        sent.append(len(reply[2]) if "Range" in headers else 0)
        return reply

    with serving(counted) as server:
        stage("download", "--mirror", downloads.GOOGLE_ARCHIVE, f"{server.url}/weights.zip",
              dataset="google_pretrained_weights")
    found = folder / "download/google_pretrained_weights" / downloads.GOOGLE_NAME
    assert (found / "vocab.txt").read_bytes() == vocabulary and (found / "bert_config.json").read_bytes() == b"{}"
    if ranges:
        assert sum(sent) < 100_000, "the weights stay on the server"


def test_another_vocabulary_than_googles_is_refused(folder, tmp_path):
    archive = google_archive(tmp_path / "weights.zip", b"[PAD]\n")
    with pytest.raises(UserError, match="vocab.txt has sha256"):
        stage("download", "--mirror", downloads.GOOGLE_ARCHIVE, archive, dataset="google_pretrained_weights")
    assert not list(folder.rglob("vocab.txt"))


def test_books_are_fetched_from_a_list_of_urls_and_failures_listed(folder, tmp_path, capsys):
    with serving(lambda path, _: (404, {"Content-Length": "0"}, b"") if "missing" in path
                 else (200, {"Content-Length": "13"}, b"A short book.")) as server:
        urls = tmp_path / "urls.txt"
        urls.write_text(f"{server.url}/a%20b.txt\n\n{server.url}/missing.txt\n{server.url}/other/a%20b.txt\n")
        stage("download", "--input_files", urls, dataset="bookscorpus")
    printed = capsys.readouterr().out
    assert "2 files, 1 skipped" in printed and "missing.txt: the server answers 404" in printed
    stage("text_formatting", dataset="bookscorpus")
    assert lines_of(folder, "bookscorpus") == ["A short book."] * 2
    record = json.loads((folder / "download/records/bookscorpus.json").read_text())
    assert len(record["skipped"]) == 1 and record["counts"] == {"files": 2, "skipped": 1}


def test_bookscorpus_without_a_source_says_so(folder):
    with pytest.raises(UserError, match="BookCorpus has no official source any more"):
        stage("download", dataset="bookscorpus")


def test_wikipedia_and_books_become_one_corpus(folder, tmp_path, dump):
    (tmp_path / "books").mkdir()
    for number in range(6):
        (tmp_path / f"books/{number}.txt").write_text(" ".join(some_sentences(20, 50 + number)))
    stage("download", *wikimedia(tmp_path / "mirror", dump))
    stage("text_formatting")
    stage("text_formatting", "--input_files", tmp_path / "books", dataset="bookscorpus")
    flags = ("--n_training_shards", 2, "--n_test_shards", 1)
    stage("sharding", *flags, dataset="books_wiki_en_corpus")
    stage("create_vocabulary", *flags, "--vocab_size", 60, dataset="books_wiki_en_corpus")
    stage("create_hdf5_files", *flags, "--max_seq_length", 32, dataset="books_wiki_en_corpus")
    record = json.loads(next(folder.glob("sharded_*/records/books_wiki_en_corpus.json")).read_text())
    assert list(record["inputs"]) == ["wikicorpus_en/part_00000.txt", "bookscorpus/part_00000.txt"]
    found = next(folder.glob("hdf5_*")) / "books_wiki_en_corpus"
    assert sum(shard.rows for split in ("training", "test") for shard in find_shards(found, split)) > 50
    text = "".join(path.read_text() for path in folder.glob("sharded_*/books_wiki_en_corpus/*.txt"))
    assert sum(bool(line) for line in text.split("\n")) == 12 * 8 + 6 * 20


# archives


def make_archive(path: Path, members: dict[str, bytes], link: str | None = None) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in members.items():
                file.writestr(name, content)
            if link:
                info = zipfile.ZipInfo(link)
                info.external_attr = 0o120777 << 16
                file.writestr(info, "/etc/passwd")
        return path
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            file.addfile(info)
    return path


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/tmp/evil.txt", "..\\evil.txt", "C:\\evil.txt"])
def test_an_archive_that_would_leave_its_folder_is_refused_whole(folder, tmp_path, ending, name):
    archive = make_archive(tmp_path / f"books{ending}", {"good.txt": b"Good book.", name: b"evil"})
    with pytest.raises(UserError, match="would leave the folder"):
        stage("download", "--input_files", archive, dataset="bookscorpus")
    assert not list(tmp_path.rglob("evil.txt")) and not list(tmp_path.rglob("good.txt"))


@pytest.mark.parametrize("ending", [".zip", ".tar.gz"])
def test_archives_of_books_are_unpacked_but_not_their_links(tmp_path, folder, ending):
    archive = make_archive(tmp_path / f"books{ending}", {"shelf/good.txt": b"Good book.", "cover.jpg": b"x"})
    stage("download", "--input_files", archive, dataset="bookscorpus")
    stage("text_formatting", dataset="bookscorpus")
    assert lines_of(folder, "bookscorpus") == ["Good book."]
    with pytest.raises(UserError, match="is no regular file"):
        archives.unpack(make_archive(tmp_path / f"bad{ending}", {}, link="passwd.txt"), tmp_path / "out")


def test_a_broken_archive_is_named(tmp_path):
    path = make_archive(tmp_path / "books.zip", {"a.txt": b"x" * 1000})
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="books.zip: no readable archive"):
        archives.unpack(path, tmp_path / "out")


# the script


def test_the_script_refuses_other_words_and_books_without_a_source(tmp_path):
    script = ["bash", "data/create_datasets_from_start.sh"]
    for words, message in ((["nonsense"], "none of wiki_only, wiki_books, sample"), (["wiki_books"], "BOOKS"),
                           (["corpus", "x"], "a name, and the files or folders")):
        outcome = subprocess.run([*script, *words], cwd=ROOT, capture_output=True, text=True, check=False,
                                 env=os.environ | {"BERT_PREP_WORKING_DIR": str(tmp_path), "BOOKS": "",
                                                       "PYTHON": sys.executable})
        assert outcome.returncode == 2 and message in outcome.stderr


def test_unknown_actions_data_sets_and_flags_end_with_status_2(tmp_path):
    assert "invalid choice" in prepare(tmp_path, "fly", status=2)
    assert "nor a name of your own" in prepare(tmp_path, "download", dataset="wiki.xx", status=2)
    assert "--n_processes" in prepare(tmp_path, "sharding", "--n-processes", 0, status=2)
    assert "unrecognized" in prepare(tmp_path, "sharding", "--no_such_flag", status=2)
    assert SAMPLE not in str(list(tmp_path.rglob("*")))
