"""From unpacked shards and a recipe to packed shards, with bounded memory and a bounded number of open files.

Three passes, each of independent tasks that may run in parallel processes:

1. survey:  check the rows of each block of the input and count their lengths.  The counts give the recipe.
2. scatter: read every block again, and write its sequences to temporary files, sorted by the part (output shard) that
            they go to (assignment.py).
3. gather:  for each part, collect its sequences from all blocks and write the packed shard.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.masking import MaskingRule, ranges
from data.origin import Origin
from data.packing.assignment import RowAssignment, ranks_within
from data.packing.blocks import Block
from data.shards import LABELS, MASK_KEYS, Objective, write_shard
from data.token_counts import count_tokens

TOKENS_PER_PART = 2**23  # padding included: 16,384 rows of 512

SEQUENCE = np.dtype([("row", "i4"), ("slot", "i4"), ("length", "i4"), ("predictions", "i4"), ("label", "i1")])
TOKEN = np.dtype([("input_ids", "i4"), ("segment_ids", "i1")])
PREDICTION = np.dtype([("position", "i4"), ("id", "i4")])  # the position counts from the sequence's own start
RECORDS = {"sequences": SEQUENCE, "tokens": TOKEN, "predictions": PREDICTION}
INDEX_LINE = len(RECORDS) * 8  # bytes: where a part begins in each of the three files


# --- survey ---

@dataclass(frozen=True)
class Survey:
    """What packing needs to know of a block; the arrays are indexed by length, from 0 to the row length."""

    histogram: np.ndarray
    most_predictions: np.ndarray  # the most masked tokens in a sequence of that length
    predictions: int              # masked tokens stored in the block: none with --dynamic_masking


def survey(block: Block) -> Survey:
    """Count the lengths of a block's sequences.  UserError naming file and row where a row cannot be packed."""
    keys = [key for key in block.shard.keys if key in ("input_mask", "masked_lm_positions")]
    rows = block.read(keys)
    lengths = checked_lengths(block, rows["input_mask"])
    rule = block.shard.rule
    if rule:
        predictions = rule.predictions(lengths)
    else:
        positions = rows["masked_lm_positions"]
        refuse_rows(block, ((positions < 0) | (positions >= lengths[:, None])).any(axis=1),
                    "has a masked_lm_position outside its sequence")
        predictions = np.count_nonzero(positions, axis=1)
    most_predictions = np.zeros(block.shard.sequence_length + 1, np.int64)
    np.maximum.at(most_predictions, lengths, predictions)
    histogram = np.bincount(lengths, minlength=block.shard.sequence_length + 1)
    return Survey(histogram, most_predictions, 0 if rule else int(predictions.sum()))


def checked_lengths(block: Block, input_mask: np.ndarray) -> np.ndarray:
    """The number of tokens in each row, (n,), from masks (n, S) that must be ones followed by zeros."""
    lengths = np.count_nonzero(input_mask, axis=1)
    refuse_rows(block, lengths == 0, "is empty (input_mask is 0 everywhere)")
    refuse_rows(block, ((input_mask != 0) & (input_mask != 1)).any(axis=1),
                "has an input_mask that is not 0 or 1: is the shard packed already?")
    expected = np.arange(input_mask.shape[1]) < lengths[:, None]
    refuse_rows(block, (expected != input_mask).any(axis=1), "has a gap in its input_mask")
    return lengths


def refuse_rows(block: Block, bad: np.ndarray, fault: str) -> None:
    if bad.any():
        raise UserError(f"{block.row_name(np.argmax(bad))} {fault}")


# --- scatter ---

@dataclass(frozen=True, kw_only=True)
class Layout:
    """The shape of the output, and the folder of the temporary files."""

    row_count: int
    row_length: int
    max_sequences: int  # in a row
    prediction_slots: int  # in a row
    folder: Path
    part_name: str
    rule: MaskingRule | None  # of shards without masks
    objective: Objective
    origin: Origin

    @property
    def rows_per_part(self) -> int:
        return max(1, TOKENS_PER_PART // self.row_length)

    @property
    def part_count(self) -> int:
        return -(-self.row_count // self.rows_per_part)

    def rows_in(self, part: int) -> int:
        return min(self.rows_per_part, self.row_count - part * self.rows_per_part)

    def part_file(self, part: int) -> Path:
        return self.folder / self.part_name.format(part)

    def file(self, block_number: int, records: str) -> Path:
        return self.folder / f"block_{block_number}.{records}"


def temporary_bytes(surveys: list[Survey], part_count: int) -> int:
    histogram = sum(survey.histogram for survey in surveys)
    sequences, tokens = int(histogram.sum()), int(histogram @ np.arange(len(histogram)))
    predictions = sum(survey.predictions for survey in surveys)
    return (sequences * SEQUENCE.itemsize + tokens * TOKEN.itemsize + predictions * PREDICTION.itemsize
            + len(surveys) * (part_count + 1) * INDEX_LINE)


def scatter(block: Block, assignment: RowAssignment, ranks_before: np.ndarray, layout: Layout) -> None:
    """Write the sequences of a block to its temporary files.

    `ranks_before[length]` counts the sequences of that length in the blocks before this one.
    """
    rows = block.read()
    lengths = np.count_nonzero(rows["input_mask"], axis=1)
    output_rows, slots = assignment.rows_and_slots(lengths, ranks_before[lengths] + ranks_within(lengths))
    parts, rows_in_part = np.divmod(output_rows, layout.rows_per_part)
    order = np.argsort(parts, kind="stable")
    rows = {key: values[order] for key, values in rows.items()}
    sequences, tokens, predictions = records_of(rows, lengths[order], rows_in_part[order], slots[order])

    # The index: where each part begins in each of the three files, and where the last one ends.
    firsts = np.searchsorted(parts[order], np.arange(layout.part_count + 1))
    amounts = np.stack([np.ones(len(order), np.int64), sequences["length"], sequences["predictions"]], axis=1)
    begins = np.concatenate([np.zeros((1, 3), np.int64), np.cumsum(amounts, axis=0)])[firsts]
    begins.tofile(layout.file(block.number, "index"))
    for name, records in zip(RECORDS, (sequences, tokens, predictions), strict=True):
        records.tofile(layout.file(block.number, name))


def records_of(rows: dict, lengths, output_rows, slots) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The records of unpacked rows, in the order of the rows."""
    is_token = rows["input_mask"] != 0
    tokens = np.empty(np.count_nonzero(is_token), TOKEN)
    for key in TOKEN.names:
        tokens[key] = rows[key][is_token]

    positions, ids = (rows.get(key, np.zeros((len(lengths), 0), np.int32)) for key in MASK_KEYS)
    is_prediction = positions > 0
    predictions = np.empty(np.count_nonzero(is_prediction), PREDICTION)
    predictions["position"] = positions[is_prediction]
    predictions["id"] = ids[is_prediction]

    sequences = np.empty(len(lengths), SEQUENCE)
    sequences["row"] = output_rows
    sequences["slot"] = slots
    sequences["length"] = lengths
    sequences["predictions"] = np.count_nonzero(is_prediction, axis=1)
    sequences["label"] = rows.get(LABELS, 0)
    return sequences, tokens, predictions


# --- gather ---

def gather(part: int, block_count: int, layout: Layout, path: Path) -> tuple[int, np.ndarray]:
    """Write one packed shard; returns the number of its sequences, and how often each token occurs."""
    pieces = [read_piece(block_number, part, layout) for block_number in range(block_count)]
    sequences, tokens, predictions = (np.concatenate(records) for records in zip(*pieces, strict=True))
    rows = packed_rows(sequences, tokens, predictions, layout, layout.rows_in(part))
    write_shard(path, rows, layout.rule, layout.prediction_slots, layout.objective, layout.origin)
    return len(sequences), count_tokens(rows)


def read_piece(block_number: int, part: int, layout: Layout) -> list[np.ndarray]:
    """The records that a block holds for a part: sequences, tokens and predictions."""
    begins, ends = np.fromfile(layout.file(block_number, "index"), np.int64, count=6,
                               offset=part * INDEX_LINE).reshape(2, 3)
    return [np.fromfile(layout.file(block_number, name), record, count=end - begin, offset=begin * record.itemsize)
            for (name, record), begin, end in zip(RECORDS.items(), begins, ends, strict=True)]


def packed_rows(sequences, tokens, predictions, layout: Layout, row_count: int) -> dict[str, np.ndarray]:
    """Rows of the packed form, from records in any order.  The slots of a row are 0, 1, … without a gap."""
    shape = (row_count, layout.max_sequences)
    row_and_slot = (sequences["row"], sequences["slot"])
    lengths, prediction_counts, labels = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int8)
    lengths[row_and_slot] = sequences["length"]
    prediction_counts[row_and_slot] = sequences["predictions"]
    labels[row_and_slot] = sequences["label"]
    starts = np.cumsum(lengths, axis=1) - lengths
    prediction_starts = np.cumsum(prediction_counts, axis=1) - prediction_counts

    rows = {"next_sentence_positions": np.where(lengths > 0, starts, 0), "next_sentence_labels": labels,
            "next_sentence_weights": (lengths > 0).astype(np.int32)}

    zeros = np.zeros(len(sequences), np.int32)
    positions = ranges(zeros, sequences["length"])
    targets = np.repeat(sequences["row"] * layout.row_length + starts[row_and_slot], sequences["length"]) + positions
    token_values = {"input_ids": tokens["input_ids"], "segment_ids": tokens["segment_ids"], "positions": positions,
                    "input_mask": np.repeat(sequences["slot"] + 1, sequences["length"])}
    for key, values in token_values.items():
        rows[key] = spread(values, targets, (row_count, layout.row_length))

    width = layout.prediction_slots
    targets = np.repeat(sequences["row"] * width + prediction_starts[row_and_slot], sequences["predictions"])
    targets += ranges(zeros, sequences["predictions"])
    offsets = np.repeat(starts[row_and_slot], sequences["predictions"])
    rows["masked_lm_positions"] = spread(predictions["position"] + offsets, targets, (row_count, width))
    rows["masked_lm_ids"] = spread(predictions["id"], targets, (row_count, width))
    return rows


def spread(values: np.ndarray, targets: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """An array of zeros with `values` at the flat indices `targets`."""
    array = np.zeros(shape, values.dtype)
    array.reshape(-1)[targets] = values
    return array
