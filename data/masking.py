"""Masking: which tokens are to be predicted, and what the model sees in their place.  No torch here.

Of the tokens of a sequence other than [CLS] and [SEP], min(max_predictions_per_seq, max(1, round(length · 15 %))) are
chosen, where the length includes [CLS] and [SEP]; 80 % of them become [MASK], 10 % a random word, 10 % stay unchanged
(Devlin et al. 2018).  Every random choice in a row depends on the row's key alone.  Data preparation masks once; with
--dynamic_masking the training masks instead, with keys from seed, epoch and row.

With --whole_word_mask whole words are chosen (a token and the '##' pieces that follow it), one after the other until
that number is reached; a word of more pieces than are left is passed over.  Each piece is then replaced independently
(google-research/bert, "Whole Word Masking").

Shapes: B rows, S tokens a row, N the most sequences that share a row, K masked tokens of all rows.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from data.counter_rng import draws

SPECIALS_PER_SEQUENCE = 3  # [CLS] A [SEP] B [SEP]
MASKED, REPLACED = 0.8, 0.1  # proportions of the predicted tokens that become [MASK] and a random word
POSITION_BITS, NUMBER_BITS = 16, 8  # of a sort key: a token's position and its sequence's number; the rest is random
LAST = np.uint64(2**64 - 1)  # sorts behind every token
FEW_TOKENS = 8  # of each sequence, looked at first in place of a word that is cut
LONGEST_ROW, MOST_SEQUENCES = 2**POSITION_BITS, 2**NUMBER_BITS - 2  # limits of rows that are masked here


@dataclass(frozen=True)
class MaskingRule:
    masked_lm_prob: float
    max_predictions_per_seq: int
    vocab_size: int
    special_ids: tuple[int, int, int, int, int]  # [PAD] [UNK] [CLS] [SEP] [MASK]
    whole_word_mask: bool = False
    continuing: bytes = field(default=b"", repr=False, compare=False)  # see packed_bits; empty: not known

    def __post_init__(self):
        if not 0.0 <= self.masked_lm_prob <= 1.0 or self.max_predictions_per_seq < 1 or len(self.special_ids) != 5 \
                or not all(0 <= number < self.vocab_size for number in self.special_ids) \
                or self.vocab_size <= len(self.special_ids):  # no other word to put in
            raise ValueError(f"not a valid masking rule: {self}")
        if len(self.continuing) != -(-self.vocab_size // 8) and (self.continuing or self.whole_word_mask):
            raise ValueError(f"{len(self.continuing)} bytes say which of {self.vocab_size} tokens continue a word")

    @cached_property
    def replacement_ids(self) -> np.ndarray:
        """The ids that can replace a token: all but the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids).astype(np.int32)

    @cached_property
    def continues_word(self) -> np.ndarray:
        """For each id, whether it is a '##' piece.  (V,) bool"""
        return np.unpackbits(np.frombuffer(self.continuing, np.uint8), count=self.vocab_size).astype(bool)

    def predictions(self, lengths: np.ndarray) -> np.ndarray:
        """How many tokens of sequences of these lengths are predicted.

        >>> MaskingRule(0.15, 20, 30522, (0, 100, 101, 102, 103)).predictions(np.array([0, 5, 50, 512]))
        array([ 0,  1,  8, 20])
        """
        wanted = np.clip(np.rint(lengths * self.masked_lm_prob), 1, self.max_predictions_per_seq)
        return np.clip(wanted, 0, np.maximum(lengths - SPECIALS_PER_SEQUENCE, 0)).astype(np.int64)

    @property
    def description(self) -> str:
        return (f"without masks ({self.masked_lm_prob:.0%} of the tokens, at most {self.max_predictions_per_seq} a "
                f"sequence, in a vocabulary of {self.vocab_size} with {', '.join(map(str, self.special_ids))})")


def packed_bits(continuing: np.ndarray) -> bytes:
    """One bit for each token of a vocabulary: whether it continues a word.  (V,) bool"""
    return np.packbits(continuing).tobytes()


def row_keys(seed: int, epoch: int, shard: int, rows: np.ndarray) -> np.ndarray:
    """The key of each row of a shard in an epoch: numbers in the shard (B,) → (B,) uint64"""
    start = np.random.SeedSequence([seed, epoch, shard]).generate_state(1, np.uint64)
    return draws(start, rows)


def masked(rows: dict[str, np.ndarray], rule: MaskingRule, slots: int, keys: np.ndarray) -> dict[str, np.ndarray]:
    """Mask rows of either form, each sequence by itself.  Positions ascend; empty slots are 0.

    Returns input_ids (B, S), masked_lm_positions and masked_lm_ids (B, slots).
    """
    input_ids = rows["input_ids"].astype(np.int32)
    row, slot, position = chosen_tokens(rows["input_mask"], input_ids, rule, keys)  # (K,), (K,), (K,)
    tokens = input_ids[row, position]
    positions, labels = np.zeros((2, len(input_ids), slots), np.int32)
    positions[row, slot] = position
    labels[row, slot] = tokens
    input_ids[row, position] = shown(tokens, rule, draws(keys[row], position + 2**POSITION_BITS))
    return {"input_ids": input_ids, "masked_lm_positions": positions, "masked_lm_ids": labels}


def shown(tokens: np.ndarray, rule: MaskingRule, random_bits: np.ndarray) -> np.ndarray:
    """What the model sees in place of predicted tokens.  (K,) each

    The upper half of each 64-bit random number chooses between [MASK], a random word and the token, the lower the word.
    """
    uniform = (random_bits >> np.uint64(32)) * 2.0**-32
    ids = rule.replacement_ids
    words = ids[((random_bits & np.uint64(2**32 - 1)) * np.uint64(len(ids))) >> np.uint64(32)]
    return np.where(uniform < MASKED, rule.special_ids[4], np.where(uniform < MASKED + REPLACED, words, tokens))


def chosen_tokens(input_mask, input_ids, rule: MaskingRule, keys) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row, prediction slot and position of the tokens to predict, in the order of their rows and positions.  (K,) each

    The tokens of a row are sorted by the number of their sequence, then at random; the first of each are chosen.  Where
    whole words are masked, the pieces of a word stand together in that order.
    """
    rows, length = input_ids.shape
    numbers = np.arange(1, int(input_mask.max(initial=1)) + 1)
    assert length <= LONGEST_ROW and len(numbers) <= MOST_SEQUENCES, (length, len(numbers))
    _, _, cls, sep, _ = rule.special_ids
    free = (input_ids != cls) & (input_ids != sep) & (input_mask != 0)  # (B, S)
    inside = pieces_inside_words(input_ids, free, rule) if rule.whole_word_mask else None

    positions = np.arange(length, dtype=np.uint64)
    order = draws(keys[:, None], positions) >> np.uint64(NUMBER_BITS) & ~np.uint64(2**POSITION_BITS - 1)
    if inside is not None:
        give_words_one_key(order.reshape(-1), inside)
    order |= positions
    order |= input_mask.astype(np.uint64) << np.uint64(64 - NUMBER_BITS)
    order[~free] = LAST
    order.sort(axis=1)  # (B, S)

    members = [input_mask == number for number in numbers]
    lengths, available = (np.stack([mask.sum(axis=1) for mask in masks], axis=1)  # (B, N)
                          for masks in (members, [mask & free for mask in members]))
    counts = np.minimum(rule.predictions(lengths), available)
    first = np.cumsum(available, axis=1) - available + np.arange(rows)[:, None] * length
    others = None
    if inside is not None:
        cut = CutWords(order, first + counts, first + available, inside)
        counts.reshape(-1)[cut.sequences] -= cut.pieces
        others = cut.other_words()
    rank = ranges(first.ravel(), counts.ravel())  # (K,) into the sorted tokens

    in_rows = counts.sum(axis=1)
    chosen = np.zeros(rows * length, bool)
    chosen[np.repeat(np.arange(rows) * length, in_rows) + positions_in(order.ravel()[rank])] = True
    if others is not None:
        chosen[others] = True
        in_rows += np.bincount(others // length, minlength=rows)
    row = np.repeat(np.arange(rows), in_rows)
    return row, ranges(np.zeros(rows, np.int64), in_rows), np.flatnonzero(chosen) - row * length


def positions_in(sort_keys: np.ndarray) -> np.ndarray:
    return (sort_keys & np.uint64(2**POSITION_BITS - 1)).astype(np.int64)


# --- whole words; places are indices into the flat rows, (B·S,) ---

def pieces_inside_words(input_ids, free, rule: MaskingRule) -> np.ndarray:
    """Which tokens belong to the word of the token before them, and False for the end.  (B, S) → (B·S + 1,) bool

    A piece behind [CLS] or [SEP], where its word was cut off, begins a word here.
    """
    inside = np.zeros(input_ids.size + 1, bool)
    inside[:-1] = (rule.continues_word.take(input_ids) & free).ravel()
    inside[1:-1] &= free.ravel()[:-1]
    inside[:-1:input_ids.shape[1]] = False
    return inside


def give_words_one_key(keys: np.ndarray, inside: np.ndarray) -> None:
    """Give all pieces of a word the key of its first one, in place.

    >>> keys = np.array([7, 3, 9, 1, 5])
    >>> give_words_one_key(keys, np.array([False, False, True, True, False, False]))
    >>> keys
    array([7, 3, 3, 3, 5])
    """
    pieces, number = np.flatnonzero(inside), 1
    while len(pieces):  # those behind at least `number` pieces of their word
        keys[pieces] = keys[pieces - 1]
        pieces = pieces[inside[pieces - number]]
        number += 1


class CutWords:
    """The words of which the chosen tokens hold some pieces only, and the words to choose in their place.

    order: the sorted keys of the rows (B, S); next_, ends: of each sequence the rank behind its chosen tokens and that
    behind all its tokens, (B, N).  K of these sequences (`sequences`) have such a word, and `pieces` of it are chosen.
    """

    def __init__(self, order: np.ndarray, next_: np.ndarray, ends: np.ndarray, inside: np.ndarray):
        self.keys, self.inside = order.reshape(-1), inside
        row_starts = np.repeat(np.arange(len(order)) * order.shape[1], ends.shape[1])
        next_, ends = next_.reshape(-1), ends.reshape(-1)
        place = row_starts + positions_in(self.keys.take(next_, mode="clip"))
        self.sequences = np.flatnonzero(inside.take(place, mode="clip") & (next_ < ends))
        self.row_starts, self.next, self.ends = (values[self.sequences, None] for values in (row_starts, next_, ends))
        behind = place[self.sequences]
        begin = behind - 1
        while (further := inside[begin]).any():
            begin -= further
        self.pieces = behind - begin

    def other_words(self) -> np.ndarray:
        """The places of the pieces of words with at most so many pieces together as are chosen of the cut word.

        One word after the other, in their order, is taken if it does not exceed what is left.  A pass looks at some
        tokens, up to the first word that would, and the next pass goes over that word.
        """
        found, left, next_, width = [], self.pieces[:, None], self.next, FEW_TOKENS
        while len(left):
            ranks = next_ + np.arange(width)  # (K, width)
            places = self.row_starts + positions_in(self.keys.take(ranks, mode="clip"))
            sizes = word_sizes(places, self.inside, int(left.max()))
            sizes *= (sizes <= left) & (ranks < self.ends)
            not_beyond = np.cumsum(sizes, axis=1) <= left
            sizes *= not_beyond
            taken = sizes > 0
            found.append(ranges(places[taken], sizes[taken]))
            left = left - sizes.sum(axis=1, keepdims=True)
            next_ = next_ + not_beyond.sum(axis=1, keepdims=True)
            width *= 2
            if not ((left > 0) & (next_ < self.ends)).any():
                break
        return np.concatenate(found) if found else self.pieces


def word_sizes(places: np.ndarray, inside: np.ndarray, longest: int) -> np.ndarray:
    """How many pieces the words at these places have, `longest` + 1 where more; 0 where no word begins.

    >>> word_sizes(np.array([4, 1, 0, 2]), np.array([False, False, True, True, False, False]), 1)
    array([1, 2, 1, 0])
    """
    pieces = inside.take(places[..., None] + np.arange(longest + 1), mode="clip")
    pieces[..., 0] ^= True
    return np.logical_and.accumulate(pieces, axis=-1).sum(axis=-1)


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """range(start, start + count) for each start and count, joined, in the dtype of `starts`.

    >>> ranges(np.array([5, 0, 90]), np.array([3, 0, 2]))
    array([ 5,  6,  7, 90, 91])
    """
    return np.arange(counts.sum(), dtype=starts.dtype) + np.repeat(
        (starts - np.cumsum(counts) + counts).astype(starts.dtype), counts)
