"""Training samples from text: a text shard (a sentence a line, a blank line between documents) to an HDF5 shard.

The text is read in blocks of documents, so that memory does not depend on the size of a shard.  The samples of a block,
pairs of segments or full sentences (full_sentences.py), are planned as offsets into one array of token ids; then rows
are made of them, in random order.

Shapes: B rows of a block, S = max_seq_length, P = max_predictions_per_seq.
"""

import math
import os
import zlib
from bisect import bisect_left
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random

import numpy as np

from common import cli
from common.errors import UserError
from common.text import open_text
from data import shards
from data.masking import SPECIALS_PER_SEQUENCE, MaskingRule, masked, packed_bits
from data.origin import Origin
from data.preparation.full_sentences import FullSentences
from data.preparation.text_counts import WAYS_OUT, TextCounts, covered
from data.tokenizer import SPECIAL_TOKENS, WordPieceEncoder, continuing_tokens
from data.vocabulary import Vocabulary

READ_BYTES = 1 << 21  # read at a time; a block of documents is at most twice as large
BLOCK_TOKENS = 1 << 20  # tokens in the rows that are made at a time
RANDOM_NEXT = 0.5  # share of the pairs that get a random second segment
PASSES = 5  # over the text, by default; 1 with dynamic masking
ROUND_PREDICTIONS = 4  # up to a multiple of it: 20 of 128 tokens and 80 of 512, as published
NEW_OPTIONS = ("whole_word_mask", "no_nsp")  # those of earlier versions' records lack them
# The plan of a sample: token offsets and lengths of its two segments, and the next sentence label.
PAIR = np.dtype([("a_start", "i8"), ("a_length", "i8"), ("b_start", "i8"), ("b_length", "i8"), ("is_random", "i8")])


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The flags that add_sample_flags declares."""

    max_seq_length: int = 512
    max_predictions_per_seq: int | None = None  # becomes what masked_lm_prob asks for
    masked_lm_prob: float = 0.15
    dupe_factor: int | None = None  # becomes PASSES, or 1 with dynamic_masking
    short_seq_prob: float = 0.1
    random_seed: int = 12345
    do_lower_case: bool = True
    dynamic_masking: bool = False
    whole_word_mask: bool = False
    no_nsp: bool = False

    def __post_init__(self):
        if self.max_predictions_per_seq is None:
            object.__setattr__(self, "max_predictions_per_seq", predictions_for(self.max_seq_length,
                                                                                self.masked_lm_prob))
        if self.dupe_factor is None:
            object.__setattr__(self, "dupe_factor", 1 if self.dynamic_masking else PASSES)
        if self.max_seq_length < SPECIALS_PER_SEQUENCE + 2:
            raise UserError(f"--max_seq_length {self.max_seq_length}: two segments and three special tokens need at "
                            f"least {SPECIALS_PER_SEQUENCE + 2}")
        if self.random_seed < 0:
            raise UserError(f"--random_seed {self.random_seed} is negative")

    @property
    def objective(self) -> shards.Objective:
        return shards.Objective(nsp=not self.no_nsp, whole_word_mask=self.whole_word_mask)

    def recorded(self) -> dict:
        """What decides the samples besides the text and the vocabulary, for the records."""
        return {name: value for name, value in asdict(self).items() if value or name not in NEW_OPTIONS}

    def limit_warning(self) -> str | None:
        """A line where max_predictions_per_seq is below what masked_lm_prob asks for in a full row."""
        wanted = min(round(self.max_seq_length * self.masked_lm_prob), self.max_seq_length - SPECIALS_PER_SEQUENCE)
        if wanted <= self.max_predictions_per_seq:
            return None
        return (f"--max_predictions_per_seq {self.max_predictions_per_seq} is below the {wanted} that --masked_lm_prob "
                f"{self.masked_lm_prob} asks for in {self.max_seq_length} tokens: of these "
                f"{self.max_predictions_per_seq / self.max_seq_length:.1%} will be predicted (without the flag, up to "
                f"{predictions_for(self.max_seq_length, self.masked_lm_prob)} tokens a sample are)")


def predictions_for(length: int, masked_lm_prob: float) -> int:
    """The most predictions that a sample of this many tokens has room for, where no flag says it.

    >>> [predictions_for(length, prob) for length, prob in ((128, 0.15), (512, 0.15), (128, 0.4), (7, 0.15))]
    [20, 80, 52, 4]
    """
    wanted = math.ceil(round(length * masked_lm_prob, 6) / ROUND_PREDICTIONS) * ROUND_PREDICTIONS
    return max(1, min(wanted, length - SPECIALS_PER_SEQUENCE))


def add_sample_flags(parser) -> None:
    """Declare a flag for each field of SampleOptions."""
    group = parser.add_argument_group("samples")
    group.add_argument("--max_seq_length", type=cli.positive_int,
                       help="length of a sample in tokens: 128 for phase 1, 512 for phase 2")
    group.add_argument("--max_predictions_per_seq", type=cli.positive_int,
                       help="maximum number of tokens to predict in a sample (default: what --masked_lm_prob asks for "
                            f"in a full sample, as a multiple of {ROUND_PREDICTIONS}: 20 for 128 tokens, 80 for 512)")
    group.add_argument("--masked_lm_prob", type=cli.proportion, help="proportion of the tokens to predict")
    group.add_argument("--whole_word_mask", action="store_true",
                       help="mask whole words: a token and all ## pieces that follow it, or none of them")
    group.add_argument("--no_nsp", action="store_true",
                       help="samples without a second segment and without next sentence prediction: full sentences "
                            "up to --max_seq_length, across the ends of documents; every token is in one")
    group.add_argument("--dynamic_masking", action="store_true",
                       help="store the samples without masks; training draws new masks in every epoch")
    group.add_argument("--dupe_factor", type=cli.positive_int,
                       help=f"passes over the text, each with different pairs and masks (default: {PASSES}, or 1 with "
                            "--dynamic_masking)")
    group.add_argument("--short_seq_prob", type=cli.proportion,
                       help="proportion of the documents that are cut into shorter samples; none with --no_nsp")
    group.add_argument("--random_seed", type=cli.whole,
                       help="seed for pairs and masks; the same seed gives the same files")
    group.add_argument("--do_lower_case", **cli.BOOLEAN,
                       help="lower-case the text and strip accents, for an uncased vocabulary")
    parser.set_defaults(**{field.name: field.default for field in fields(SampleOptions)})


@dataclass(frozen=True)
class Documents:
    """Tokens: sentence i is ids[bounds[i]:bounds[i + 1]], document j holds the sentences first[j]:first[j + 1]."""

    ids: np.ndarray  # (tokens,) int32
    bounds: np.ndarray  # (sentences + 1,) int64
    first: np.ndarray  # (documents + 1,) int64


def create_shard(input_file, output_file, tokens: list[str], options: SampleOptions, more_files: tuple = ()) -> dict:
    """Make the HDF5 shard of one or more text shards; returns their TextCounts as a dictionary.

    The files' names are part of the random seed.  UserError, and no file, where every token of the text is [UNK].
    """
    input_files = (input_file, *more_files)
    seed = [options.random_seed, zlib.crc32(os.fsencode(",".join(Path(path).stem for path in input_files)))]
    random, rng = Random(repr(seed)), np.random.default_rng(seed)
    encoder = WordPieceEncoder(tokens, options.do_lower_case)
    continuing = continuing_tokens(tokens)
    rule = MaskingRule(options.masked_lm_prob, options.max_predictions_per_seq, len(tokens),
                       tuple(tokens.index(token) for token in SPECIAL_TOKENS), options.whole_word_mask,
                       packed_bits(continuing))
    counts = TextCounts(random_next=None if options.no_nsp else 0)
    origin = Origin.of_texts(Vocabulary.of(tokens, options.do_lower_case), input_files)
    with shards.writing(output_file, options.max_seq_length, options.max_predictions_per_seq,
                        rule if options.dynamic_masking else None, options.objective, origin) as append:
        for lines in document_blocks(*input_files):
            documents = tokenize(lines, encoder)
            counts.add_text(documents, rule, continuing)
            samples = (FullSentences(documents, options, rule.special_ids) if options.no_nsp else
                       SegmentPairs(documents, truncate(plan_pairs(documents, options, random), options, rng), rule))
            counts.add_samples(samples, rule)
            for rows in sample_rows(samples, rule, options, rng):
                counts.predicted_tokens += predictions_in(rows, rule)
                append(rows)
        if counts.only_unknown:
            raise UserError(f"{', '.join(map(str, input_files))}: each of its {counts.tokens:,} tokens is [UNK], so "
                            f"its samples would teach nothing. {WAYS_OUT}")
    return asdict(counts)


def predictions_in(rows: dict[str, np.ndarray], rule: MaskingRule) -> int:
    """How many tokens of the rows are predicted, or, where they come without masks, will be at most."""
    if shards.MASK_KEYS[0] in rows:
        return int(np.count_nonzero(rows[shards.MASK_KEYS[0]]))
    return int(rule.predictions(np.count_nonzero(rows["input_mask"], axis=1)).sum())


def counts_of_words(lines: list[str], tokens: list[str], lower_case: bool) -> dict[str, int]:
    """The TextCounts of these lines that do not depend on samples."""
    ids, _ = WordPieceEncoder(tokens, lower_case).encode(lines)
    counts = TextCounts()
    counts.add_tokens(ids, tokens.index("[UNK]"), continuing_tokens(tokens))
    return {figure: getattr(counts, figure) for figure in ("tokens", "unknown_tokens", "words", "long_words")}


def document_blocks(*paths):
    """Yield the lines of text shards, stripped, in lists that hold whole documents.  The end of a file ends a document.

    A block holds 2 to 4 MB, about a thousand articles, or the whole of smaller shards: enough documents for random
    segments.
    """
    waiting = []
    for number, path in enumerate(paths):
        waiting += [""] if number else []
        for lines, full in line_blocks(path):
            if full and "" in waiting:
                cut = len(waiting) - waiting[::-1].index("")
                yield waiting[:cut]
                waiting = waiting[cut:]
            waiting += lines
    yield waiting


def line_blocks(path):
    """Yield the stripped lines of about 2 MB of a text file, and whether it was that much."""
    try:
        with open_text(path) as file:
            while lines := file.readlines(READ_BYTES):
                yield [line.strip() for line in lines], sum(map(len, lines)) >= READ_BYTES
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        name = "UTF-8" if error.encoding == "utf-8" else error.encoding
        raise UserError(f"{path}: not {name} ({error.reason} {error.object[error.start]:#04x})") from None


def tokenize(lines: list[str], encoder: WordPieceEncoder) -> Documents:
    """Lines to tokens.  Sentences without a token, and documents without a sentence, are skipped."""
    ids, offsets = encoder.encode(lines)
    blank = np.array([not line for line in lines], bool)
    filled = np.diff(offsets) > 0
    first = np.unique(np.concatenate([[0], np.cumsum(filled)[blank], [filled.sum()]])).astype(np.int64)
    return Documents(ids, np.concatenate([[0], offsets[1:][filled]]).astype(np.int64), first)


def plan_pairs(documents: Documents, options: SampleOptions, random: Random) -> np.recarray:
    """Pairs of segments of every document, dupe_factor times over, not yet cut to length."""
    bounds, first = documents.bounds.tolist(), documents.first.tolist()
    longest = options.max_seq_length - SPECIALS_PER_SEQUENCE
    pairs = []
    for _ in range(options.dupe_factor):
        for document in range(len(first) - 1):
            target = longest
            if random.random() < options.short_seq_prob:
                target = random.randint(2, longest)
            pairs += document_pairs(document, bounds, first, target, random)
    return np.array(pairs, PAIR).view(np.recarray)


def document_pairs(document: int, bounds: list[int], first: list[int], target: int, random: Random):
    """Yield the pairs of one document, as tuples in the order of PAIR.

    Sentences are taken until they hold `target` tokens; a random number of them, at least one, is the first segment.
    The second is the rest of them, or as much of another document as the target allows; the next pair then begins with
    the rest.  A single sentence always gets a random second segment.  Without another document, all second segments are
    the true ones, and a single sentence is skipped.
    """
    sentence, end = first[document], first[document + 1]
    others = len(first) - 2
    while sentence < end:
        stop = bisect_left(bounds, bounds[sentence] + target, sentence + 1, end)
        taken = stop - sentence
        split = sentence + 1 + (int(random.random() * (taken - 1)) if taken > 1 else 0)
        a_start, a_length = bounds[sentence], bounds[split] - bounds[sentence]
        if others and (taken == 1 or random.random() < RANDOM_NEXT):
            b_first, b_stop = random_segment(document, bounds, first, target - a_length, random)
            yield a_start, a_length, bounds[b_first], bounds[b_stop] - bounds[b_first], 1
            sentence = split
        else:
            if taken > 1:
                yield a_start, a_length, bounds[split], bounds[stop] - bounds[split], 0
            sentence = stop


def random_segment(document: int, bounds, first, target: int, random: Random) -> tuple[int, int]:
    """Sentences of another document from a random one on, until they hold `target` tokens or the document ends."""
    other = int(random.random() * (len(first) - 2))
    other += other >= document
    start, end = first[other], first[other + 1]
    start += int(random.random() * (end - start))
    return start, bisect_left(bounds, bounds[start] + target, start + 1, end)


def truncate(pairs: np.recarray, options: SampleOptions, rng: np.random.Generator) -> np.recarray:
    """Cut the pairs that are too long: token by token off the longer segment, at its front or its back at random.

    The lengths are computed directly: the longer segment shrinks to the length of the shorter, then both in turn, the
    second first.
    """
    longest = options.max_seq_length - SPECIALS_PER_SEQUENCE
    a, b = pairs.a_length, pairs.b_length
    too_long = a + b > longest
    new_a = np.where(too_long, np.where(b <= longest // 2, longest - b, np.minimum(a, longest - longest // 2)), a)
    new_b = np.where(too_long, longest - new_a, b)
    cut = pairs.copy()
    cut.a_start += rng.binomial(a - new_a, 0.5)
    cut.b_start += rng.binomial(b - new_b, 0.5)
    cut.a_length, cut.b_length = new_a, new_b
    return cut


def sample_rows(samples, rule: MaskingRule, options: SampleOptions, rng):
    """Yield the rows of all samples (SegmentPairs or FullSentences), in random order, in blocks."""
    order = rng.permutation(len(samples.lengths))
    block = max(1, BLOCK_TOKENS // options.max_seq_length)
    for start in range(0, len(order), block):
        rows = samples.rows(order[start:start + block], options.max_seq_length)
        if not options.dynamic_masking:
            keys = rng.integers(2**64, size=len(rows["input_ids"]), dtype=np.uint64)
            rows |= masked(rows, rule, options.max_predictions_per_seq, keys)
        yield rows


class SegmentPairs:
    """The samples of a block of text with next sentence prediction: [CLS] A [SEP] B [SEP].

    lengths: their tokens, special ones included, (n,); used_tokens: how many tokens of the text are in one;
    random_next: how many have a random second segment.
    """

    def __init__(self, documents: Documents, pairs: np.recarray, rule: MaskingRule):
        self.ids, self.pairs, self.special_ids = documents.ids, pairs, rule.special_ids
        self.lengths = pairs.a_length + pairs.b_length + SPECIALS_PER_SEQUENCE
        self.used_tokens = covered(np.concatenate([pairs.a_start, pairs.b_start]),
                                   np.concatenate([pairs.a_length, pairs.b_length]), len(documents.ids))
        self.random_next = int(pairs.is_random.sum())

    def rows(self, numbers: np.ndarray, sequence_length: int) -> dict[str, np.ndarray]:
        """The rows of some samples, without masks."""
        return token_rows(self.ids, self.pairs[numbers], sequence_length, self.special_ids)


def token_rows(tokens: np.ndarray, pairs: np.recarray, sequence_length: int, special_ids) -> dict[str, np.ndarray]:
    """The rows [CLS] A [SEP] B [SEP] and padding, without masks."""
    pad, _, cls, sep, _ = special_ids
    column = np.arange(sequence_length)[None, :]  # (1, S)
    a, b = pairs.a_length[:, None], pairs.b_length[:, None]  # (B, 1)
    source = np.where(column <= a, pairs.a_start[:, None] - 1, pairs.b_start[:, None] - 2 - a) + column  # (B, S)
    input_ids = tokens.take(source, mode="clip")  # (B, S)
    end = a + b + 2  # the position of the last [SEP]
    input_ids[:, 0] = cls
    rows = np.arange(len(pairs))
    input_ids[rows, pairs.a_length + 1] = sep
    input_ids[rows, end[:, 0]] = sep
    real = column <= end  # (B, S)
    input_ids[~real] = pad
    return {
        "input_ids": input_ids,
        "input_mask": real.astype(np.int8),
        "segment_ids": (real & (column > a + 1)).astype(np.int8),
        "next_sentence_labels": pairs.is_random.astype(np.int8),
    }
