"""What sample building counts of a text, and what it says of a text that teaches little.  No torch here."""

from dataclasses import asdict, dataclass, fields

import numpy as np

from data.masking import MaskingRule

MOST_UNKNOWN = 0.05  # of the tokens; a vocabulary that fits its text leaves less than 1 %
ONE_SIDED = 0.05  # pairs of one kind, random or true; half of each kind is meant
FEWEST_PAIRS = 8  # among fewer, one kind can be missing by chance
LEAST_USED = 0.5  # of the tokens; English articles are used almost completely
MANY_PIECES = 4  # more are a word that the vocabulary hardly knows
MOST_LONG_WORDS = 0.05  # of the words; in English text 2,048 tokens trained on it leave 2 %, 8,192 0.3 %
LEAST_PREDICTED = 0.9  # of the predictions that --masked_lm_prob asks for
LONE_SENTENCES = 1.1  # sentences a document
IN_SHARES_ONLY = ("long_words", "sample_tokens", "predicted_tokens", "wanted_predictions")
WAYS_OUT = ("Give a vocabulary of this language (--vocab_file, or train one) and the case that it is made for "
            "(--do_lower_case), and put spaces between the words of a script that writes none (Thai, Khmer, Lao): "
            "more than 100 characters without a space are one [UNK]")


@dataclass(kw_only=True)
class TextCounts:
    """Counts of one text or of several.

    None: an older record, which lacks the figure, is among those summed, or (random_next) there is no such thing.
    A further figure is a field here, counted in an `add_` method, and said in `description` or in `warnings`.
    """

    documents: int | None = 0
    sentences: int | None = 0
    tokens: int | None = 0
    unknown_tokens: int | None = 0  # tokens that are [UNK]
    used_tokens: int | None = 0  # tokens of the text that are in a sample of any pass
    samples: int | None = 0
    random_next: int | None = 0  # samples with a random second segment
    words: int | None = 0  # and signs
    long_words: int | None = 0  # in more than MANY_PIECES tokens
    sample_tokens: int | None = 0  # with special tokens
    predicted_tokens: int | None = 0  # of sample_tokens
    wanted_predictions: int | None = 0  # that masked_lm_prob asks for

    def add_text(self, documents, rule: MaskingRule, continuing: np.ndarray) -> None:
        """Count the Documents of a block (samples.py).

        continuing: for each token of the vocabulary, whether it continues a word.
        """
        self.documents += len(documents.first) - 1
        self.sentences += len(documents.bounds) - 1
        self.add_tokens(documents.ids, rule.special_ids[1], continuing)

    def add_samples(self, samples, rule: MaskingRule) -> None:
        """Count the samples of a block (SegmentPairs or FullSentences)."""
        self.used_tokens += samples.used_tokens
        self.samples += len(samples.lengths)
        if self.random_next is not None:
            self.random_next += samples.random_next
        self.sample_tokens += int(samples.lengths.sum())
        self.wanted_predictions += round(float(samples.lengths.sum()) * rule.masked_lm_prob)

    def add_tokens(self, ids: np.ndarray, unknown_id: int, continuing: np.ndarray) -> None:
        """Count tokens and the words that they are the pieces of."""
        pieces = np.diff(np.append(np.flatnonzero(~continuing[ids]), len(ids)))
        self.tokens += len(ids)
        self.unknown_tokens += int(np.count_nonzero(ids == unknown_id))
        self.words += len(pieces)
        self.long_words += int(np.count_nonzero(pieces > MANY_PIECES))

    @classmethod
    def total(cls, records: list[dict]) -> "TextCounts":
        """The sum of the counts in records of finished shards."""
        return cls(**{name: None if any(counts.get(name) is None for counts in records)
                      else sum(counts[name] for counts in records) for name in (field.name for field in fields(cls))})

    def totals(self) -> dict[str, int]:
        """The counts that a line lists; the others are in the shares of `description`."""
        return {name: count for name, count in asdict(self).items() if name not in IN_SHARES_ONLY}

    def share(self, part: str, whole: str) -> float | None:
        """One count as a share of another; None where it cannot be said."""
        counted, of = getattr(self, part), getattr(self, whole)
        return counted / of if of and counted is not None else None

    @property
    def only_unknown(self) -> bool:
        return self.share("unknown_tokens", "tokens") == 1.0

    @property
    def description(self) -> str:
        """The shares in one line."""
        used = self.share("used_tokens", "tokens") if self.samples else None
        shares = (("{:.1%} of the tokens are [UNK]", self.share("unknown_tokens", "tokens")),
                  ("{:.2f} pieces a word", self.share("tokens", "words")),
                  (f"{{:.1%}} of the words are in more than {MANY_PIECES}", self.share("long_words", "words")),
                  ("{:.1%} of the tokens are in a sample", used),
                  ("{:.1%} of the pairs are random", self.share("random_next", "samples")),
                  ("{:.1%} of a sample is predicted", self.share("predicted_tokens", "sample_tokens")))
        return ", ".join(text.format(share) for text, share in shares if share is not None) or "no token in it"

    def warnings(self) -> list[str]:
        """A line for each sign that the samples teach little, with its usual causes."""
        unknown, used = self.share("unknown_tokens", "tokens"), self.share("used_tokens", "tokens")
        lines = [self.pairs_warning(), self.pieces_warning(), self.predictions_warning()]
        if unknown is not None and unknown > MOST_UNKNOWN:
            lines.append(f"{unknown:.1%} of the tokens are [UNK]: the vocabulary does not fit this text. {WAYS_OUT}")
        if used is not None and used < LEAST_USED:
            lines.append(f"the samples use only {used:.1%} of the text's tokens. A sample takes no more of a sentence "
                         "than fits into --max_seq_length: a line of the text should be one sentence, not a paragraph")
        return [line for line in lines if line]

    def pieces_warning(self) -> str | None:
        share = self.share("long_words", "words")
        if share is None or share <= MOST_LONG_WORDS:
            return None
        return (f"{share:.1%} of the words are in more than {MANY_PIECES} pieces: the vocabulary is too small for this "
                "text, or of another language (--vocab_file, or train a larger one: --vocab_size)")

    def predictions_warning(self) -> str | None:
        reached = self.share("predicted_tokens", "wanted_predictions")
        if reached is None or reached >= LEAST_PREDICTED:
            return None
        share = self.share("predicted_tokens", "sample_tokens")
        return (f"{share:.1%} of a sample is predicted, {reached:.0%} of what --masked_lm_prob asks for: "
                "--max_predictions_per_seq is too small for --max_seq_length (left out, it follows from them)")

    def pairs_warning(self) -> str | None:
        share = self.share("random_next", "samples")
        if share is None:
            return None
        lone = self.sentences <= LONE_SENTENCES * self.documents
        if self.samples < FEWEST_PAIRS and not lone and self.documents > 1:
            return None
        if share >= 1 - ONE_SIDED:
            reason = ("the documents have one sentence each: a blank line ends a document, so there should be none "
                      "after every sentence" if lone else
                      "most sentences fill a sample by themselves: a line should be one sentence, not a paragraph")
            return f"{share:.1%} of the pairs have a random second segment, and NSP learns nothing: {reason}"
        if share <= ONE_SIDED:
            return (f"{share:.1%} of the pairs have a random second segment, and NSP learns nothing: a random segment "
                    "comes from another document of the file, and a blank line separates documents")
        return None


def covered(starts: np.ndarray, lengths: np.ndarray, size: int) -> int:
    """How many of `size` positions lie in at least one of the intervals.

    >>> covered(np.array([0, 1, 6]), np.array([2, 2, 1]), 8)
    4
    """
    changes = np.bincount(starts, minlength=size + 1) - np.bincount(starts + lengths, minlength=size + 1)
    return int(np.count_nonzero(np.cumsum(changes[:size])))
