"""Which vocabulary a data set or a model was made with, and whether two of them are the same.  No torch here.

Shards (origin.py), checkpoints (checkpoint/state.py) and Hugging Face folders carry it.  Older shards and checkpoints,
and those of other programs, do not: None stands for what is not known, and fits everything.
"""

import hashlib
import re
from dataclasses import asdict, dataclass, field

from common.errors import UserError, dictionary, whole_number

ROOM_FOR_WORDS = 0.05  # share of the model's vocab_size that a vocabulary may leave free
FREE = re.compile(r"\[unused\d+\]")  # the name of a token that no text has
CASED = 0.05  # share of the tokens with a capital letter: a cased vocabulary has about a third, an uncased one none
VOCABULARY = "vocabulary"  # its key in the contents of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The identity of a vocabulary, and its tokens where they are carried."""

    sha256: str  # of `lines`
    size: int  # tokens
    lower_case: bool | None  # whether the text is lower-cased before it is tokenized; None: not known
    lines: str | None = field(default=None, compare=False, repr=False)  # the tokens, each with a "\n" behind it

    @classmethod
    def of(cls, tokens: list[str], lower_case: bool | None) -> "Vocabulary":
        lines = "".join(f"{token}\n" for token in tokens)
        return cls(sha256=sha256_of(lines), size=len(tokens), lower_case=lower_case, lines=lines)

    @classmethod
    def from_dict(cls, values: dict, what) -> "Vocabulary":
        """From a to_dict() in a file; UserError, with `what`, where a value is malformed."""
        sha256, lower_case, lines = (values.get(key) for key in ("sha256", "lower_case", "lines"))
        size = whole_number(values, "size", what)
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise UserError(f"{what}: sha256 is {repr(sha256)[:50]}, no checksum of a vocabulary")
        if lower_case not in (None, False, True):
            raise UserError(f"{what}: lower_case is {repr(lower_case)[:50]}, neither true nor false")
        if lines is not None and not (isinstance(lines, str) and lines.count("\n") == size
                                      and sha256_of(lines) == sha256):
            raise UserError(f"{what}: its lines are not the {size} tokens with that checksum")
        return cls(sha256=sha256, size=size, lower_case=lower_case, lines=lines)

    def to_dict(self) -> dict:
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def tokens(self) -> list[str] | None:
        return None if self.lines is None else self.lines.split("\n")[:-1]

    @property
    def description(self) -> str:
        return f"{self.size:,} tokens{case_words(self.lower_case)} (sha256 {self.sha256[:12]}…)"

    def same_tokens(self, other: "Vocabulary") -> bool:
        """Whether the ids mean the same, but for [unusedN] at the end of the longer one, as an export adds them."""
        shorter, longer = sorted((self, other), key=lambda vocabulary: vocabulary.size)
        if shorter.size == longer.size or longer.tokens is None:
            return shorter.sha256 == longer.sha256
        start, rest = longer.tokens[:shorter.size], longer.tokens[shorter.size:]
        return Vocabulary.of(start, None).sha256 == shorter.sha256 and all(map(FREE.fullmatch, rest))

    def extends(self, other: "Vocabulary") -> bool:
        """Whether this is the other one with words in its [unusedN] places or behind it."""
        if self.tokens is None or other.tokens is None or self.size < other.size:
            return False
        return all(old == new or FREE.fullmatch(old) for old, new in zip(other.tokens, self.tokens, strict=False))

    def same_case(self, other: "Vocabulary") -> bool:
        return None in (self.lower_case, other.lower_case) or self.lower_case == other.lower_case


def vocabulary_in(contents: dict, path) -> Vocabulary | None:
    """That of the contents of a checkpoint, where they name one."""
    values = dictionary(contents, VOCABULARY, path)
    return Vocabulary.from_dict(values, f"{path}: {VOCABULARY}") if values else None


def check_same_vocabulary(one: Vocabulary | None, what: str, other: Vocabulary | None, other_what: str,
                          may_extend: bool = False) -> None:
    """UserError naming both sides where both are known, and are not the same.

    With `may_extend`, one may hold words where the other has none.
    """
    if one is None or other is None:
        return
    fits = one.same_tokens(other) or (may_extend and one.extends(other))
    if not fits or not one.same_case(other):
        raise UserError(f"{what}: its vocabulary has {one.description}, but that of {other_what} {other.description}")


def check_size(size: int, vocab_size: int, what: str) -> None:
    """UserError where a vocabulary has more tokens than the model, or leaves more than a few free."""
    if not (1 - ROOM_FOR_WORDS) * vocab_size <= size <= vocab_size:
        raise UserError(f"{what}: {size} tokens, but vocab_size in the config is {vocab_size}")


def is_cased(tokens: list[str]) -> bool:
    """Whether there are more tokens with a capital letter than a lower-casing tokenizer could leave there by chance."""
    words = [token for token in tokens if not re.fullmatch(r"\[.+\]", token)]
    return sum(token != token.lower() for token in words) > CASED * len(words)


def check_case(tokens: list[str], lower_case: bool, what: str) -> None:
    """UserError where the tokenizer would lower-case the text for a cased vocabulary."""
    if lower_case and is_cased(tokens):
        raise UserError(f"{what}: a cased vocabulary (more than {CASED:.0%} of its {len(tokens)} tokens have a capital "
                        f"letter), but --do_lower_case is 1: give --do_lower_case 0, or an uncased vocabulary")


def case_words(lower_case: bool | None) -> str:
    return "" if lower_case is None else ", lower-cased" if lower_case else ", cased"


def sha256_of(lines: str) -> str:
    return hashlib.sha256(lines.encode("utf-8", "surrogatepass")).hexdigest()
