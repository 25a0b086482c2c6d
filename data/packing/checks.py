"""What must hold for the rows of a packed shard.

n rows, S tokens a row, N sequences at most in a row, P + N prediction slots a row.
"""

from collections.abc import Iterator

import numpy as np
from scipy.stats import binom

from data.shards import LABELS

SHOWN_AS_EXPECTED = 0.9  # proportion of the masked tokens that are [MASK] or unchanged; the others are random words
ACCIDENT = 1e-12  # a sequence with so few of these is faulty if the probability of that is lower


def faults(rows: dict[str, np.ndarray], cls_token: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a description of each possible fault, and which rows have it, (n,) bool.

    Rows with wrong sequence numbers are not checked further.
    """
    mask = rows["input_mask"]
    misnumbered = misnumbered_rows(mask, rows["next_sentence_weights"].shape[1])
    yield "input_mask does not number its sequences 1, 2, … from the left, then padding of 0", misnumbered
    sound = np.flatnonzero(~misnumbered)
    rows = {key: values[sound] for key, values in rows.items()}
    of_predictions = prediction_faults(rows) if "masked_lm_positions" in rows else ()  # else they are masked later
    for fault, bad in (*sequence_faults(rows, cls_token), *of_predictions):
        spread = np.zeros(len(mask), bool)
        spread[sound[bad]] = True
        yield fault, spread


def misnumbered_rows(mask: np.ndarray, max_sequences: int) -> np.ndarray:
    """Which rows, (n,), do not hold 1s, then 2s, and so on, then 0s; an empty row is one of them."""
    before, after = mask[:, :-1], mask[:, 1:]
    follows = (after == before) | (after == 0) | ((after == before + 1) & (before > 0))
    return (mask[:, 0] != 1) | ~follows.all(axis=1) | (mask.max(axis=1) > max_sequences)


def sequence_faults(rows: dict[str, np.ndarray], cls_token: int) -> Iterator[tuple[str, np.ndarray]]:
    """Faults of tokens, segments, positions and next-sentence columns, in rows with correct sequence numbers."""
    mask, segments = rows["input_mask"], rows["segment_ids"]
    starts = sequence_starts(mask)
    offsets = np.arange(mask.shape[1])
    first_offset = np.maximum.accumulate(np.where(starts, offsets, 0), axis=1)
    padding = mask == 0
    yield "positions do not restart at 0 with each sequence, or are not 0 in the padding", (
        rows["positions"] != np.where(padding, 0, offsets - first_offset)).any(axis=1)
    for key in ("input_ids", "segment_ids"):
        yield f"{key} are not 0 in the padding", (padding & (rows[key] != 0)).any(axis=1)
    nsp = LABELS in rows
    yield f"segment_ids are {'neither 0 nor 1' if nsp else 'not 0'}", (
        (segments != 0) & ((segments != 1) | (not nsp))).any(axis=1)
    yield "a sequence does not begin with [CLS]", (starts & (rows["input_ids"] != cls_token)).any(axis=1)

    expected = np.zeros(rows["next_sentence_positions"].shape, np.int64)
    row, offset = np.nonzero(starts)
    expected[row, mask[row, offset] - 1] = offset
    held = np.arange(expected.shape[1]) < mask.max(axis=1, initial=0)[:, None]
    labels = rows.get(LABELS, np.zeros_like(held, np.int8))
    yield "next_sentence_positions are not where the sequences begin", (
        rows["next_sentence_positions"] != expected).any(axis=1)
    yield "next_sentence_weights are not 1 for each sequence and 0 beyond", (
        rows["next_sentence_weights"] != held).any(axis=1)
    yield "next_sentence_labels are neither 0 nor 1, or not 0 beyond the last sequence", (
        (labels != 0) & ((labels != 1) | ~held)).any(axis=1)


def prediction_faults(rows: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Faults of the masked tokens, in rows with correct sequence numbers."""
    mask, positions, labels = rows["input_mask"], rows["masked_lm_positions"], rows["masked_lm_ids"]
    used = positions != 0
    yield "a masked_lm_position is used after an empty slot", (used[:, 1:] & ~used[:, :-1]).any(axis=1)
    outside = (positions < 0) | (positions >= np.count_nonzero(mask, axis=1)[:, None])
    yield "a masked_lm_position is outside all sequences", (outside & used).any(axis=1)
    ordered = np.sort(positions, axis=1)
    yield "a masked_lm_position occurs twice", (
        (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != 0)).any(axis=1)
    yield "masked_lm_ids are not above 0 in the slots used and 0 in the others", (
        np.where(used, labels <= 0, labels != 0)).any(axis=1)
    inside = np.where(outside, 0, positions)
    yield "a masked_lm_position is that of a [CLS] or [SEP]", (
        used & np.take_along_axis(cls_and_sep(mask, rows["segment_ids"]), inside, axis=1)).any(axis=1)
    yield "the masked_lm_positions of a sequence do not point at [MASK] or at their own labels", misplaced_rows(
        rows, used & ~outside, inside)


def misplaced_rows(rows: dict[str, np.ndarray], used: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Which rows, (n,), hold a sequence whose masked tokens do not look masked: its positions may be shifted."""
    tokens = np.take_along_axis(rows["input_ids"], positions, axis=1)
    numbers = np.where(used, np.take_along_axis(rows["input_mask"], positions, axis=1), 0)
    bad = np.zeros(len(tokens), bool)
    if not used.any():
        return bad
    mask_token = np.bincount(tokens[used].clip(min=0)).argmax()
    plausible = (tokens == mask_token) | (tokens == rows["masked_lm_ids"])
    fewest = binom.ppf(ACCIDENT, np.arange(positions.shape[1] + 1), SHOWN_AS_EXPECTED)  # for each number of predictions
    for number in range(1, int(numbers.max()) + 1):
        here = numbers == number
        bad |= np.count_nonzero(here & plausible, axis=1) < fewest[np.count_nonzero(here, axis=1)]
    return bad


def sequence_starts(mask: np.ndarray) -> np.ndarray:
    """Where a sequence begins, (n, S) bool."""
    before = np.concatenate([np.zeros_like(mask[:, :1]), mask[:, :-1]], axis=1)
    return (mask != before) & (mask != 0)


def cls_and_sep(mask: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Where [CLS] and [SEP] stand in sequences of the form [CLS] A [SEP] B [SEP], (n, S) bool."""
    after = np.concatenate([mask[:, 1:], np.zeros_like(mask[:, :1])], axis=1)
    segment_after = np.concatenate([segments[:, 1:], np.zeros_like(segments[:, :1])], axis=1)
    ends = (mask != after) & (mask != 0)
    ends_a = (mask == after) & (segments == 0) & (segment_after == 1)
    return sequence_starts(mask) | ends | ends_a
