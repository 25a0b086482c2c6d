"""The sentence splitters on sentences of 20 languages, many of them with abbreviations.

    python benchmarks/sentence_splitters.py

The sentences are in sentences_by_language.txt.  For each language and splitter: ends that are none, ends that were not
found, and how many there are.
"""

from collections import defaultdict
from pathlib import Path

from measuring import ROOT  # noqa: F401 (puts the repository's root on the path)

# isort: split
from common import cli
from common.errors import UserError
from data.preparation.sentences import default_method, split_document

CASES = Path(__file__).with_name("sentences_by_language.txt")
COLUMNS = {"by default": None, "English punkt": ("punkt", "en"), "nltk": ("nltk", None), "punkt": ("punkt", None),
           "sentencex": ("sentencex", None), "rule": ("rule", None)}


def main(argv=None) -> None:
    cli.ArgumentParser(description=__doc__).parse_args(argv)
    print("| language | ends | " + " | ".join(COLUMNS) + " |\n|---|---|" + "---|" * len(COLUMNS))
    totals = {name: [0, 0] for name in COLUMNS}
    for language, paragraphs in cases_by_language().items():
        cells = []
        for name in COLUMNS:
            method, splits_as = COLUMNS[name] or (default_method(language), language)
            found = outcome(paragraphs, method, splits_as or language)
            totals[name] = [a + b for a, b in zip(totals[name], found or (0, 0), strict=True)]
            cells.append("–" if found is None else f"{found[0]} + {found[1]}")
        print(f"| {language} | {sum(map(len, paragraphs))} | " + " | ".join(cells) + " |")
    print("| all | | " + " | ".join(f"{wrong} + {missed}" for wrong, missed in totals.values()) + " |")


def cases_by_language() -> dict[str, list[list[str]]]:
    """The paragraphs of each language as lists of their sentences."""
    cases = defaultdict(list)
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            language, _, paragraph = line.partition("\t")
            cases[language].append(paragraph.split(" | "))
    return cases


def outcome(paragraphs: list[list[str]], method: str, language: str) -> tuple[int, int] | None:
    """Ends that are none, and ends not found; None where the method does not know the language."""
    wrong = missed = 0
    for sentences in paragraphs:
        text = ("" if language in ("zh", "ja") else " ").join(sentences)
        try:
            found, real = end_places(split_document(text, method, language)), end_places(sentences)
        except UserError:
            return None
        wrong, missed = wrong + len(found - real), missed + len(real - found)
    return wrong, missed


def end_places(sentences: list[str]) -> set[int]:
    """Where sentences end, counted in characters that are no spaces."""
    lengths = [len("".join(sentence.split())) for sentence in sentences]
    return {sum(lengths[:number]) for number in range(1, len(lengths) + 1)}


if __name__ == "__main__":
    cli.run(main)
