"""Claims about text in other languages: where its sentences end, its Wikipedia, and its tokens."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import sentence_splitters
from common.download import file_checksum
from common.errors import UserError
from data import bertPrep
from data.preparation import sentences, wikipedia
from data.preparation.sentences import default_method, split_document
from tests.support.preparation import page, write_dump

ABBREVIATIONS = {
    "de": ["z.B. Hunde", "z. B. Hunde", "d. h. Brot", "d.h. Brot", "Dr. Alt", "usw. im Haus", "bzw. Brot"],
    "bg": ["1878 г. в София", "т.е. двамата", "ул. Раковски", "проф. Иванов", "напр. кучета", "5 лв. за килограм"],
    "es": ["Sr. García", "Dra. López", "pág. 12", "p. ej. perros"],
    "fr": ["M. Dupont", "p. ex. les chiens", "av. J.-C. à Rome", "cf. le tableau"],
    "ru": ["1878 г. в Москве", "т. е. собаки", "и т. д. лежат", "ул. Ленина", "А. С. Пушкин", "рис. 3"],
    "sr": ["1901. године", "A. B. Petrović"],  # no splitter knows it
}


def split(text: str, language: str) -> list[str]:
    return split_document(text, default_method(language), language)


@pytest.mark.parametrize(("language", "words"), [(language, words) for language in ABBREVIATIONS
                                                 for words in ABBREVIATIONS[language]])
def test_abbreviations_of_the_language_end_no_sentence(language, words):
    first, second = f"Aa bb {words} cc dd.", "Это конец." if language in ("bg", "ru") else "Ende gut."
    assert split(f"{first} {second}", language) == [first, second]


def test_the_default_of_a_language_is_the_best_that_there_is():
    for language, paragraphs in sentence_splitters.cases_by_language().items():
        wrong, missed = sentence_splitters.outcome(paragraphs, default_method(language), language)
        assert wrong + missed <= max(2, 0.5 * sum(sentence_splitters.outcome(paragraphs, "punkt", "en"))) \
            or language == "tr", (language, wrong, missed)


@given(st.text(alphabet="abÄя. !?…9\"»\n", max_size=80),
       st.sampled_from([("rule", "xx"), ("sentencex", "bg"), ("punkt", "de")]))
def test_every_splitter_keeps_every_character(text, how):
    found = split_document(text, *how)
    assert "".join("".join(sentence.split()) for sentence in found) == "".join(text.split())


def test_small_letters_only_and_text_without_a_splitter_are_split_too():
    assert split("he left. it rained. why?", "sw") == ["he left.", "it rained.", "why?"]
    assert split("он ушёл. шёл дождь.", "bg") == ["он ушёл.", "шёл дождь."]
    assert [default_method(code) for code in ("en", "de", "pt-BR", "uk", "zh_yue", "sw")] == [
        "punkt", "punkt", "punkt", "sentencex", "punkt", "rule"]
    for method in ("punkt", "nltk", "sentencex", "nupunkt"):
        with pytest.raises(UserError, match=f"--segmentation_method {method} does not know --language sw: .*rule spl"):
            sentences.splitter(method, "sw")


def stage(action: str, *flags, dataset: str) -> None:
    bertPrep.main(["--action", action, "--dataset", dataset, "--n_processes", "1", *map(str, flags)])


def sentences_of(work, dataset: str) -> list[str]:
    return [line for path in work.glob(f"sharded_*/{dataset}/*.txt")
            for line in path.read_text(encoding="utf-8").split("\n") if line]


@pytest.mark.parametrize(("flags", "count", "said"), [
    (("--language", "de"), 2, "sentences of the language de by punkt"),
    ((), 3, "sentences of the language en by punkt"),
    (("--language", "sw"), 2, "no splitter knows the language sw: . ! ? … before a space end a sentence")])
def test_the_language_of_a_text_decides_its_sentences_and_is_recorded(work, capsys, flags, count, said):
    Path("t.txt").write_text("Hier leben z.B. alte Hunde. Sie schlafen.\n" * 20)
    stage("sharding", "--input_files", "t.txt", *flags, dataset="mine")
    assert len(sentences_of(work, "mine")) == 20 * count and said in capsys.readouterr().out
    options = json.loads(next(work.glob("sharded_*/records/mine.json")).read_text())["options"]
    assert options.get("language") == (flags[1] if flags else None)


# Wikipedias


@pytest.mark.parametrize(("wikitext", "line"), [
    ("'''Köln''\' ist eine [[Stadt]].\n[[Datei:Dom.jpg|mini|Dom]]\n[[Kategorie:Ort]]\n__INHALTSVERZEICHNIS__",
     "Köln ist eine Stadt."),
    ("'''София''\' е [[столица]]та.\n[[Файл:x.jpg|мини|Снимка]]\n[[Категория:Градове]]\n__БЕЗ_СЪДЪРЖАНИЕ__",
     "София е столицата."),
    ("'''北京市''\'，簡稱-{zh-hans:京; zh-hant:亰}-，是[[中華人民共和國|中国]]的-{首都}-。",
     "北京市，簡稱京，是中国的首都。"),
    ("القاهرة هي [[عاصمة]] مصر.\n[[ملف:x.jpg|تصغير|صورة]]\n__لا_فهرس__", "القاهرة هي عاصمة مصر."),
    ("Python has __init__ and [[A|-{b}-]].", "Python has __init__ and b.")])
def test_markup_in_other_languages_leaves_only_text(wikitext, line):
    assert wikipedia.plain_text("T", wikitext) == line


@pytest.mark.parametrize(("dataset", "wiki", "count"), [
    ("wikicorpus_de", "dewiki", 40), ("wikicorpus_zh_yue", "zh_yuewiki", 60), ("wikicorpus_simple", "simplewiki", 60),
    ("wikicorpus_be-tarask", "be_x_oldwiki", 40)])
def test_the_wikipedia_of_every_language_is_downloaded_and_split_in_it(work, tmp_path, dataset, wiki, count):
    dump = write_dump(tmp_path / wiki / f"20260101/{wiki}-20260101-pages-articles-multistream.xml.bz2",
                      [page(f"T{number}", f"Hier, z.B. in D{number}, lebt er. Er schläft.") for number in range(20)])
    (tmp_path / wiki / "latest").mkdir()
    (tmp_path / wiki / f"latest/{wiki}-latest-sha1sums.txt").write_text(f"{file_checksum(dump, 'sha1')}  {dump.name}\n")
    for action in ("download", "text_formatting", "sharding"):
        stage(action, "--mirror", wikipedia.DUMPS, tmp_path, dataset=dataset)
    assert len(sentences_of(work, dataset)) == count
    assert len(list(work.glob(f"sharded_*_1_*_1_*/{dataset}/*.txt"))) == 2


def test_a_language_that_wikipedia_does_not_have_is_named(work, tmp_path):
    with pytest.raises(UserError, match="xxwiki/latest/xxwiki-latest-sha1sums.txt: no such file"):
        stage("download", "--mirror", wikipedia.DUMPS, tmp_path, dataset="wikicorpus_xx")
