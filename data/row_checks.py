"""Values in shards that no model can take: rows are checked before training or evaluation sees them.  No torch here."""

import numpy as np

from common.errors import UserError
from data.shards import LABELS, Shard, expected_shape, read_rows

MOST_EMPTY = 0.5  # of the rows of a shard may hold no token


def read_checked_rows(shard: Shard, vocab_size: int) -> dict[str, np.ndarray]:
    """The rows of a shard or piece; UserError naming file, row and value where this vocabulary makes one impossible."""
    rows = read_rows(shard)
    for key, values in rows.items():
        if values.shape != expected_shape(shard, key) or values.dtype.kind not in "iu":
            raise UserError(f"{shard.path}: changed since the run began: {key} is now {values.shape}, {values.dtype}")
    fault = first_fault(shard, rows, vocab_size)
    if fault:
        raise UserError(f"{shard.path}: {fault}")
    return rows


def first_fault(shard: Shard, rows: dict[str, np.ndarray], vocab_size: int) -> str | None:
    """The first impossible value in the rows of a shard, with key and row; or None."""
    sequence_length = shard.sequence_length
    limits = {"input_ids": vocab_size, "masked_lm_ids": vocab_size, "segment_ids": 1 + shard.objective.nsp, LABELS: 2,
              "masked_lm_positions": sequence_length, "positions": sequence_length,
              "next_sentence_positions": sequence_length, "next_sentence_weights": 2,
              "input_mask": shard.max_sequences + 1}
    for key, values in rows.items():
        if values.min(initial=0) < 0 or values.max(initial=0) >= limits[key]:
            row, *place = np.argwhere((values < 0) | (values >= limits[key]))[0]
            return (f"{key} of row {shard.first_row + row} holds {values[(row, *place)]}, "
                    f"not from 0 to {limits[key] - 1}")
    return empty_rows_fault(shard, rows) or (rule_fault(shard, rows["input_mask"], vocab_size) if shard.rule else None)


def empty_rows_fault(shard: Shard, rows: dict[str, np.ndarray]) -> str | None:
    """Why rows without a token cannot be passed over, or None.

    Packers of the reference leave a few, with nothing else in them; most rows of a set that was not written to the end
    are such, too.
    """
    empty = ~rows["input_mask"].any(axis=1)
    if not empty.any():
        return None
    for key in ("masked_lm_positions", "next_sentence_weights"):
        used = empty & rows[key].any(axis=1) if key in rows else empty[:0]
        if used.any():
            return f"row {shard.first_row + used.argmax()} holds no token, but {key}"
    if empty.sum() > MOST_EMPTY * len(empty):
        return (f"{empty.sum()} of its {len(empty)} rows hold no token, the first is row "
                f"{shard.first_row + empty.argmax()}")
    return None


def rule_fault(shard: Shard, input_mask: np.ndarray, vocab_size: int) -> str | None:
    """Why rows without masks cannot be masked for a model with this vocabulary, or None."""
    rule = shard.rule
    if rule.vocab_size > vocab_size:
        return f"made with a vocabulary of {rule.vocab_size}, but the config's has {vocab_size}"
    counts = tokens_to_predict(shard, input_mask)
    if counts.max(initial=0) > shard.prediction_slots:
        return (f"row {shard.first_row + counts.argmax()} has {counts.max()} tokens to predict, and room for "
                f"{shard.prediction_slots}")
    return None


def tokens_to_predict(shard: Shard, input_mask: np.ndarray) -> np.ndarray:
    """How many tokens of each row will be masked in a shard without masks.  (n, S) → (n,)"""
    return sum(shard.rule.predictions(np.count_nonzero(input_mask == number, axis=1))
               for number in range(1, shard.max_sequences + 1))
