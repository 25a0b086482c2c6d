"""Splits documents into sentences, in any language.

The default is Punkt (Kiss & Strunk 2006) with NLTK's model of the language and a list of abbreviations that this model
lacks (e.g., i.e., No. 5, Brig.); where it has no model of the language, sentencex with its abbreviations of the
language; where that has none either, a rule (ends_by_rule).  Nothing is downloaded at run time.  benchmarks/README.md
compares the splitters.

Whatever splits the rest, the marks that end a sentence in other scripts end one here, with or without a space behind
them: 。！？ in Chinese and Japanese, । in Hindi, ؟ in Arabic.  No English text holds them.
"""

import re
from functools import lru_cache, partial
from importlib import import_module
from itertools import pairwise

from common.errors import UserError

LONGEST_PIECE = 1 << 20  # characters given to a splitter at once, so that bad input takes linear memory and time

MARKS_OF_ENDS = "。｡！？।॥۔؟።፧။។៕։"
FOREIGN_ENDS = re.compile(  # marks, and the quotes and brackets that they close; ３．１４ has a decimal point
    rf"(?:[{MARKS_OF_ENDS}]|．(?![0-9０-９]))[{MARKS_OF_ENDS}．.!?…]*[」』”’）)】》〉〕］｝｣﹂﹄〟]*")

PUNKT_MODELS = {
    "cs": "czech", "da": "danish", "de": "german", "el": "greek", "en": "english", "es": "spanish", "et": "estonian",
    "fi": "finnish", "fr": "french", "it": "italian", "ml": "malayalam", "nb": "norwegian", "nl": "dutch",
    "nn": "norwegian", "no": "norwegian", "pl": "polish", "pt": "portuguese", "ru": "russian", "simple": "english",
    "sl": "slovene", "sv": "swedish", "tr": "turkish",
    "ja": "english", "zh": "english"}  # their own sentences end at FOREIGN_ENDS; the rest is often English
SENTENCEX_LANGUAGES = {  # those with rules of their own; it splits all others as English
    "am", "ar", "bg", "bn", "ca", "da", "de", "el", "en", "es", "fi", "fr", "gu", "hi", "hy", "it", "ja", "kk", "kn",
    "ml", "mr", "my", "nl", "pa", "pl", "pt", "ru", "sk", "ta", "te", "uk"}
RULE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*\s+(?=\S)")
AN_INITIAL = re.compile(r"(?:^|[\s.(])[^\W\d_]\.$")


def nltk(language: str, prefixes: bool = False):
    """Exactly nltk.sent_tokenize; `prefixes`: with more abbreviations than NLTK's model has."""
    model = PUNKT_MODELS.get(language)
    return model and import_module("punkt").tokenizer_for(model, prefixes=prefixes).tokenize


def punkt(language: str):
    split = nltk(language, prefixes=True)
    if not split or PUNKT_MODELS[language] == "english":
        return split
    return lambda text: joined_before_small_letters(split(text), text)


def nupunkt(language: str):
    return import_module("nupunkt").sentences if language in ("en", "simple") else None


def sentencex(language: str):
    if language not in SENTENCEX_LANGUAGES:
        return None
    segment = partial(import_module("sentencex").segment, language)
    return lambda text: joined_before_small_letters(segment(text), text)


def joined_before_small_letters(sentences: list[str], text: str) -> list[str]:
    """The sentences, without ends behind an abbreviation (т.е. двамата): no sentence begins with a small letter.

    Text in small letters only stays as it is.
    """
    starts, end, before, small = [], 0, "", text.islower()
    for sentence in sentences:
        start = text.index(sentence, end)
        if small or not begins_small(sentence) or not before.endswith("."):
            starts.append(start)
        end, before = start + len(sentence), sentence.rstrip()
    return [text[start:end] for start, end in pairwise([*starts, len(text)])]


def begins_small(sentence: str) -> bool:
    return sentence.lstrip(" -–(\"'„“«")[:1].islower()


def ends_by_rule(text: str) -> list[str]:
    """The rule for all other languages: . ! ? … and a space end a sentence, but not behind an initial (A. B. Name), and
    not before a small letter unless all letters are small.
    """
    sentences, start, small = [], 0, text.islower()
    for end in RULE_END.finditer(text):
        sentence = text[start:end.end()]
        if not AN_INITIAL.search(sentence.rstrip()) and (small or not begins_small(text[end.end():end.end() + 9])):
            sentences.append(sentence)
            start = end.end()
    return [*sentences, text[start:]]


# Each takes a language's code, imports its package, and returns a function from a text to its sentences; None where it
# does not know the language.  Without --segmentation_method the first that knows the language is taken.
SPLITTERS = {
    "punkt": punkt,
    "sentencex": sentencex,
    "nltk": nltk,
    "nupunkt": nupunkt,
    "rule": lambda language: ends_by_rule,
}
BY_DEFAULT = ("punkt", "sentencex", "rule")


@lru_cache
def splitter(method: str, language: str):
    """UserError where the package is not installed, or does not know the language."""
    try:
        split = SPLITTERS[method](base_language(language))
    except ImportError:
        raise UserError(f"--segmentation_method {method}: package not installed (pip install {method})") from None
    if not split:
        raise UserError(f"--segmentation_method {method} does not know --language {language}: without it, "
                        f"{default_method(language)} splits")
    return split


def default_method(language: str) -> str:
    return next(method for method in BY_DEFAULT if knows(method, base_language(language)))


def knows(method: str, language: str) -> bool:
    return {"punkt": language in PUNKT_MODELS, "sentencex": language in SENTENCEX_LANGUAGES}.get(method, True)


def base_language(language: str) -> str:
    """The language of a variety.

    >>> base_language("pt-BR"), base_language("zh_yue"), base_language("DE")
    ('pt', 'zh', 'de')
    """
    return re.split("[_-]", language.lower())[0]


def description(method: str, language: str) -> str:
    """Who splits, in a line."""
    if method == "rule":
        return (f"no splitter knows the language {language}: . ! ? … before a space end a sentence, but not before a "
                f"small letter or behind an initial")
    return f"sentences of the language {language} by {method}"


def split_document(line: str, method: str, language: str = "en") -> list[str]:
    """The sentences of a document.  Tabs separate paragraphs, and no sentence crosses a tab."""
    split = splitter(method, language)
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


def split_lines(lines: bytes, method: str, language: str) -> tuple[list[tuple[str, int]], dict]:
    """The documents in these lines, each as (its sentences, one a line; their number); and counts.

    Empty documents and documents that are not UTF-8 are skipped.
    """
    documents, empty, broken = [], 0, 0
    for line in lines.split(b"\n"):
        try:
            sentences = split_document(line.decode("utf-8"), method, language)
        except UnicodeDecodeError:
            broken += 1
            continue
        if sentences:
            documents.append(("\n".join(sentences), len(sentences)))
        elif line:
            empty += 1
    return documents, {"documents": len(documents), "empty_documents": empty, "documents_not_utf8": broken}
