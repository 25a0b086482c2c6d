"""Reads shards and checks every value, so that impossible ones do not reach the model.  No torch here."""

import numpy as np

from common.errors import UserError
from data.shards import Shard, expected_shape, read_rows


def read_checked_rows(shard: Shard, vocab_size: int) -> dict[str, np.ndarray]:
    """All rows of a shard; UserError naming file, row and value where one is impossible with this vocabulary."""
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
    limits = {"input_ids": vocab_size, "masked_lm_ids": vocab_size, "segment_ids": 2, "next_sentence_labels": 2,
              "masked_lm_positions": sequence_length, "positions": sequence_length,
              "next_sentence_positions": sequence_length, "next_sentence_weights": 2,
              "input_mask": shard.max_sequences + 1}
    for key, values in rows.items():
        bad = (values < 0) | (values >= limits[key])
        if bad.any():
            where = np.argwhere(bad)[0]
            return f"{key} of row {where[0]} holds {values[tuple(where)]}, not from 0 to {limits[key] - 1}"
    empty = ~rows["input_mask"].any(axis=1)
    if empty.any():
        return f"row {empty.argmax()} holds no token"
    return rule_fault(shard, rows["input_mask"], vocab_size) if shard.rule else None


def rule_fault(shard: Shard, input_mask: np.ndarray, vocab_size: int) -> str | None:
    """Why rows without masks cannot be masked for a model with this vocabulary, or None."""
    rule = shard.rule
    if rule.vocab_size > vocab_size:
        return f"made with a vocabulary of {rule.vocab_size}, but the config's has {vocab_size}"
    counts = tokens_to_predict(shard, input_mask)
    if counts.max(initial=0) > shard.prediction_slots:
        return f"row {counts.argmax()} has {counts.max()} tokens to predict, and room for {shard.prediction_slots}"
    return None


def tokens_to_predict(shard: Shard, input_mask: np.ndarray) -> np.ndarray:
    """How many tokens of each row will be masked in a shard without masks.  (n, S) → (n,)"""
    return sum(shard.rule.predictions(np.count_nonzero(input_mask == number, axis=1))
               for number in range(1, shard.max_sequences + 1))
