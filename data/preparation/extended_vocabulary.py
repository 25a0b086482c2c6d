"""A published vocabulary with words of a domain: in its [unusedN] places, and behind it when those are used up."""

from dataclasses import dataclass

from common.errors import UserError
from common.text import lines_of_text, open_text
from data.tokenizer import LONGEST_WORD, text_steps
from data.vocabulary import FREE

SHOWN = 5  # lines that can be no token, by name


@dataclass(frozen=True)
class ExtendedVocabulary:
    """The tokens, and what became of the lines of the file of words."""

    tokens: list[str]
    in_unused_places: int
    behind: int
    there_before: int  # in the vocabulary, or further up in the file
    no_tokens: list[str]  # lines that the tokenizer splits, or takes for [UNK]

    @property
    def counts(self) -> dict[str, int]:
        return {"tokens": len(self.tokens), "in_unused_places": self.in_unused_places, "behind": self.behind,
                "there_before": self.there_before, "no_tokens": len(self.no_tokens)}


def read_words(path) -> list[str]:
    """The lines of a file of words; UserError where it is no text, or has none."""
    try:
        with open_text(path) as file:
            lines = [line.strip() for line in lines_of_text(file.read()) if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--extend_vocab {path}: cannot be read ({error})") from None
    if not lines:
        raise UserError(f"--extend_vocab {path}: no words in it")
    return lines


def extend(base: list[str], lines: list[str], lower_case: bool) -> ExtendedVocabulary:
    """The vocabulary with those words, in the form in which they reach WordPiece: one that lower-cases (and strips
    accents) gets them so.

    The tokenizer looks up whole words only where it does not split them: a line with a space, a hyphen or two Chinese
    characters can never be one token, and is left out.

        >>> extend(["[UNK]", "[unused0]", "sea"], ["Gulls", "sea", "salt", "sea-gull"], lower_case=True).tokens
        ['[UNK]', 'gulls', 'sea', 'salt']
    """
    normalizer, pre_tokenizer = text_steps(lower_case)
    known, new, no_tokens, there_before = set(base), [], [], 0
    for line in lines:
        parts = [part for part, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(line))]
        if len(parts) != 1 or len(parts[0]) > LONGEST_WORD:
            no_tokens.append(line)
        elif parts[0] in known:
            there_before += 1
        else:
            known.add(parts[0])
            new += parts
    places = [number for number, token in enumerate(base) if FREE.fullmatch(token)][:len(new)]
    tokens = base + new[len(places):]
    for number, word in zip(places, new, strict=False):
        tokens[number] = word
    return ExtendedVocabulary(tokens, len(places), len(new) - len(places), there_before, no_tokens)


def describe_extension(counts: dict[str, int], no_tokens: list[str]) -> str:
    """The counts of ExtendedVocabulary, from a record, in words."""
    said = [f"{counts['in_unused_places'] + counts['behind']:,} new words, {counts['in_unused_places']:,} of them in "
            f"[unusedN] places and {counts['behind']:,} behind"]
    if counts["there_before"]:
        said.append(f"{counts['there_before']:,} were there before")
    if no_tokens:
        shown = ", ".join(map(repr, no_tokens[:SHOWN])) + (", …" if len(no_tokens) > SHOWN else "")
        said.append(f"{len(no_tokens):,} lines can be no token, since the tokenizer splits them: {shown}")
    return "; ".join(said)
