"""Masking: which tokens are to be predicted, and what the model sees in their place.  No torch here.

Of the tokens of a sequence other than [CLS] and [SEP], min(max_predictions_per_seq, max(1, round(length · 15 %))) are
chosen, where the length includes [CLS] and [SEP]; 80 % of them become [MASK], 10 % a random word, 10 % stay unchanged
(Devlin et al. 2018).  Every random choice in a row depends on the row's key alone.  Data preparation masks once; with
--dynamic_masking the training masks instead, with keys from seed, epoch and row.

Shapes: B rows, S tokens a row, N the most sequences that share a row, K masked tokens of all rows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data.counter_rng import draws

SPECIALS_PER_SEQUENCE = 3  # [CLS] A [SEP] B [SEP]
MASKED, REPLACED = 0.8, 0.1  # proportions of the predicted tokens that become [MASK] and a random word
POSITION_BITS, NUMBER_BITS = 16, 8  # of a sort key: a token's position and its sequence's number; the rest is random
LAST = np.uint64(2**64 - 1)  # sorts behind every token
LONGEST_ROW, MOST_SEQUENCES = 2**POSITION_BITS, 2**NUMBER_BITS - 2  # limits of rows that are masked here


@dataclass(frozen=True)
class MaskingRule:
    masked_lm_prob: float
    max_predictions_per_seq: int
    vocab_size: int
    special_ids: tuple[int, int, int, int, int]  # [PAD] [UNK] [CLS] [SEP] [MASK]

    def __post_init__(self):
        if not 0.0 <= self.masked_lm_prob <= 1.0 or self.max_predictions_per_seq < 1 or len(self.special_ids) != 5 \
                or not all(0 <= number < self.vocab_size for number in self.special_ids) \
                or self.vocab_size <= len(self.special_ids):  # no other word to put in
            raise ValueError(f"not a valid masking rule: {self}")

    @cached_property
    def replacement_ids(self) -> np.ndarray:
        """The ids that can replace a token: all but the special ones."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids).astype(np.int32)

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

    The tokens of a row are sorted by the number of their sequence, then at random; the first of each are chosen.
    """
    rows, length = input_ids.shape
    numbers = np.arange(1, int(input_mask.max(initial=1)) + 1)
    assert length <= LONGEST_ROW and len(numbers) <= MOST_SEQUENCES, (length, len(numbers))
    _, _, cls, sep, _ = rule.special_ids
    free = (input_ids != cls) & (input_ids != sep) & (input_mask != 0)  # (B, S)

    positions = np.arange(length, dtype=np.uint64)
    order = draws(keys[:, None], positions) >> np.uint64(NUMBER_BITS) & ~np.uint64(2**POSITION_BITS - 1) | positions
    order |= input_mask.astype(np.uint64) << np.uint64(64 - NUMBER_BITS)
    order[~free] = LAST
    order.sort(axis=1)  # (B, S)

    members = [input_mask == number for number in numbers]
    lengths, available = (np.stack([mask.sum(axis=1) for mask in masks], axis=1)  # (B, N)
                          for masks in (members, [mask & free for mask in members]))
    counts = np.minimum(rule.predictions(lengths), available)
    first = np.cumsum(available, axis=1) - available + np.arange(rows)[:, None] * length
    rank = ranges(first.ravel(), counts.ravel())  # (K,) into the sorted tokens

    row = np.repeat(np.arange(rows), counts.sum(axis=1))
    chosen = np.zeros(rows * length, bool)
    chosen[row * length + (order.ravel()[rank] & np.uint64(2**POSITION_BITS - 1)).astype(np.int64)] = True
    return row, ranges(np.zeros(rows, np.int64), counts.sum(axis=1)), np.flatnonzero(chosen) - row * length


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """range(start, start + count) for each start and count, joined, in the dtype of `starts`.

    >>> ranges(np.array([5, 0, 90]), np.array([3, 0, 2]))
    array([ 5,  6,  7, 90, 91])
    """
    return np.arange(counts.sum(), dtype=starts.dtype) + np.repeat(
        (starts - np.cumsum(counts) + counts).astype(starts.dtype), counts)
