"""How often each token occurs in a training set: what a model can know without context.  No torch here.

The packer counts all tokens and keeps the counts in the set's metadata, as "token_counts": the counts by token id,
separated by blanks.  Other sets are counted over their first rows, which training checks anyway.
"""

import json

import numpy as np

from common.errors import UserError
from data.row_checks import read_checked_rows
from data.shards import INDEX, Shard, metadata_path

TOKEN_COUNTS = "token_counts"  # in the metadata, and in checkpoints
ROWS_CHECKED_FIRST = 50_000  # of a set without stored counts: read, checked and counted before the model is built
ROWS_COUNTED_AT_ONCE = 10_000  # counting takes several times their memory


def count_tokens(rows: dict[str, np.ndarray], size: int = 0) -> np.ndarray:
    """How often each token stands in rows of either form, masked tokens put back.  (V,) int64, V at least `size`

    [CLS] and [SEP], which are never predicted, are not counted.
    """
    real = rows["input_mask"] != 0
    if not real.any():
        return np.zeros(size, np.int64)
    input_ids = rows["input_ids"].astype(np.int64)
    if "masked_lm_positions" in rows:
        row, slot = np.nonzero(rows["masked_lm_positions"])
        input_ids[row, rows["masked_lm_positions"][row, slot]] = rows["masked_lm_ids"][row, slot]
    counts = np.bincount(input_ids[real], minlength=size)
    first = int(real.any(axis=1).argmax())
    last = real.shape[1] - 1 - int(real[first, ::-1].argmax())
    counts[[input_ids[first, 0], input_ids[first, last]]] = 0  # a row begins with [CLS] and ends with [SEP]
    return counts


def summed_counts(counts) -> np.ndarray:
    """The sum of arrays of counts that may differ in length."""
    counts = list(counts)
    total = np.zeros(max(map(len, counts), default=0), np.int64)
    for part in counts:
        total[:len(part)] += part
    return total


def as_text(counts: np.ndarray) -> str:
    return " ".join(map(str, counts.tolist()))


def read_checked_counts(shard: Shard, vocab_size: int) -> np.ndarray:
    """The counts of a shard, whose rows are checked as read_checked_rows does.  (vocab_size,)"""
    return counts_in(read_checked_rows(shard, vocab_size), vocab_size)


def counts_in(rows: dict[str, np.ndarray], size: int = 0) -> np.ndarray:
    """The counts of many rows.  (V,), V at least `size`"""
    return summed_counts([np.zeros(size, np.int64), *(
        count_tokens({key: values[start:start + ROWS_COUNTED_AT_ONCE] for key, values in rows.items()}, size)
        for start in range(0, len(rows["input_ids"]), ROWS_COUNTED_AT_ONCE))])


def stored_counts(shards: list[Shard], vocab_size: int) -> np.ndarray | None:
    """The counts in the metadata of a packed set, or in the index of a remote one; None where there are none.
    (vocab_size,)"""
    if shards[0].packed:
        path = metadata_path(shards[0].path.parent.resolve())
    elif shards[0].remote:
        path = shards[0].path.parent / INDEX
    else:
        return None
    try:
        text = json.loads(path.read_text(encoding="utf-8"))[TOKEN_COUNTS]
        counts = np.array(text.split(), np.int64)
    except (FileNotFoundError, KeyError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: no {TOKEN_COUNTS} can be read from it ({error!r})") from None
    if len(counts) > vocab_size and counts[vocab_size:].any():
        raise UserError(f"{path}: its {TOKEN_COUNTS} are of {len(counts)} tokens, but the config's vocab_size is "
                        f"{vocab_size}")
    return summed_counts([counts[:vocab_size], np.zeros(vocab_size, np.int64)])
