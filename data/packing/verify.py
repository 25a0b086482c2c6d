"""Verification of a packed set: each row by itself, the totals, and the sequences against the unpacked set."""

import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.masking import ranges
from data.packed_totals import difference_from_metadata, lacks_tail, named_totals
from data.packing.blocks import Block, blocks_of, with_progress
from data.packing.checks import faults
from data.packing.fingerprints import bucket_of, bucket_sums, sequence_fingerprints
from data.packing.output import UNFINISHED
from data.row_checks import tokens_to_predict
from data.shard_reader import IN_PROCESS
from data.shards import PACKED_TEST, Shard, all_shards, find_shards, metadata_path
from data.workers import open_pool


@dataclass
class Report:
    shards: int
    rows: int
    sequences: int = 0  # in rows without fault
    empty_rows: int = 0  # without a token, and with nothing else: packers of the reference leave some
    missing_rows: int = 0  # of the last part, where that is allowed
    faults: int = 0
    first_fault: str = ""  # a description

    def add(self, count: int, first_fault: str) -> None:
        self.first_fault = self.first_fault or first_fault
        self.faults += count


def packed_split(folder: str) -> str:
    """Which shards were packed into this folder, "training" or "test", by its files."""
    shards, _ = all_shards(folder, "--input_dir", IN_PROCESS, 0)
    return "test" if any(shard.path.name.startswith(PACKED_TEST) for shard in shards) else "training"


def find_of_form(folder: str, split: str, packed: bool, flag: str) -> list[Shard]:
    """The shards of a folder; UserError naming `flag` where they are not packed, or not unpacked."""
    shards = find_shards(folder, split, flag)
    if shards[0].packed != packed:
        raise UserError(f"{flag} {folder}: its shards are {shards[0].description}")
    return shards


def verify(packed: list[Shard], unpacked: list[Shard], n_processes: int, show_progress: bool,
           allow_missing_tail: bool = False) -> Report:
    """Check a packed set; with unpacked shards, also that both sets hold the same sequences.

    With `allow_missing_tail` the rows of the last part may be missing, and the sequences in them.
    """
    report = Report(shards=len(packed), rows=sum(shard.rows for shard in packed))
    with open_pool(n_processes) as pool:
        run = partial(with_progress, pool, show_progress)
        sums = verify_rows(run, packed, report)
        check_totals(packed, report, allow_missing_tail)
        if unpacked and not report.faults:
            compare(run, packed, unpacked, sums, report)
    return report


def verify_rows(run, packed: list[Shard], report: Report) -> np.ndarray:
    """Check every row by itself; returns the bucket_sums of the sequences in rows without fault."""
    cls_token, total = first_token(packed), 0
    for faulty_rows, first_fault, empty_rows, sums in run("checking rows", check_block,
                                                          [(block, cls_token) for block in blocks_of(packed)]):
        report.add(faulty_rows, first_fault)
        report.empty_rows += empty_rows
        total += sums
    report.sequences = int(total[0].sum())
    return total


def first_token(packed: list[Shard]) -> int:
    """The first token of the first row that has one: [CLS]."""
    for block in blocks_of(packed):
        rows = block.read(["input_ids", "input_mask"])
        filled = rows["input_mask"].any(axis=1)
        if filled.any():
            return int(rows["input_ids"][filled.argmax(), 0])
    raise UserError(f"{packed[0].path.parent}: no token in any of its rows")


def check_block(block: Block, cls_token: int) -> tuple[int, str, int, np.ndarray]:
    """How many rows of a block have a fault, a description of the first, how many are empty, and the bucket_sums of
    the other rows.
    """
    rows = block.read()
    numbers = np.flatnonzero(np.any([values.any(axis=1) for values in rows.values()], axis=0))  # of rows not empty
    empty_rows = len(rows["input_mask"]) - len(numbers)
    rows = {key: values[numbers] for key, values in rows.items()}
    found = list(faults(rows, cls_token))
    if block.shard.rule:
        crowded = tokens_to_predict(block.shard, rows["input_mask"]) > block.shard.prediction_slots
        found.append(("has more tokens to predict than room for them", crowded))
    faulty = np.any([bad for _, bad in found], axis=0)
    description = ""
    if faulty.any():
        first = int(np.argmax(faulty))
        description = f"{block.row_name(numbers[first])}: {next(fault for fault, bad in found if bad[first])}"
    sound = {key: values[~faulty] for key, values in rows.items()}
    return np.count_nonzero(faulty), description, empty_rows, bucket_sums(sequence_fingerprints(sound))


def check_totals(packed: list[Shard], report: Report, allow_missing_tail: bool) -> None:
    """Compare the set with its metadata, if there are any."""
    folder = packed[0].path.parent
    unfinished = Path(os.path.abspath(folder)) / UNFINISHED
    if unfinished.exists():
        report.add(1, f"{unfinished}: the packing of this folder was cut short")
    named = named_totals(folder)
    if named is None or report.faults:
        return
    rows, sequences = named
    tail_lacks = lacks_tail(rows, packed)
    if tail_lacks and allow_missing_tail and report.sequences <= sequences:
        report.missing_rows = rows - report.rows
    elif rows != report.rows:
        hint = " (--allow_missing_tail accepts that)" if tail_lacks and not allow_missing_tail else ""
        report.add(1, f"{difference_from_metadata(packed)}{hint}")
    elif sequences != report.sequences:
        report.add(1, f"{metadata_path(folder)}: names {sequences:,} sequences, the shards hold {report.sequences:,}")


def compare(run, packed: list[Shard], unpacked: list[Shard], sums: np.ndarray, report: Report) -> None:
    """Count a fault for each bucket that differs, and name a sequence that only one of the sets has.

    Where possible, that is one that the packed set should not have.
    """
    if (packed[0].rule, packed[0].objective) != (unpacked[0].rule, unpacked[0].objective):
        report.add(1, f"{packed[0].path} is {packed[0].description}, {unpacked[0].path} is {unpacked[0].description}")
        return
    original = sum(run("reading unpacked rows", sums_of_block, [(block,) for block in blocks_of(unpacked)]))
    different = np.flatnonzero((sums != original).any(axis=0))
    if report.missing_rows:
        different = surplus_buckets(run, packed, unpacked, different)
    if not len(different):
        return
    surplus = (sums - original)[0].astype(np.int64)
    bucket = int(different[np.argmax(surplus[different])])
    in_packed, in_unpacked = (
        [found for part in run("finding the difference", members, [(block, bucket) for block in blocks_of(shards)])
         for found in part] for shards in (packed, unpacked))
    report.add(len(different), first_unmatched(in_packed, in_unpacked))


def surplus_buckets(run, packed: list[Shard], unpacked: list[Shard], different: np.ndarray) -> np.ndarray:
    """Those of the buckets that differ in which the packed set holds a sequence more often than the unpacked set."""
    ours, theirs = (np.sort(np.concatenate(list(run("comparing what is there", fingerprints_in, [
        (block, different) for block in blocks_of(shards)])))) for shards in (packed, unpacked))
    values, counts = np.unique(ours, return_counts=True)
    there = np.searchsorted(theirs, values, "right") - np.searchsorted(theirs, values, "left")
    return np.unique(bucket_of(values[counts > there]))


def fingerprints_in(block: Block, buckets: np.ndarray) -> np.ndarray:
    """The fingerprints of a block's sequences that fall into these buckets."""
    values = sequence_fingerprints(block.read())
    return values[np.isin(bucket_of(values), buckets)]


def sums_of_block(block: Block) -> np.ndarray:
    return bucket_sums(sequence_fingerprints(block.read()))


def members(block: Block, bucket: int) -> list[tuple[int, str]]:
    """The fingerprints of one bucket, and the names of their sequences."""
    rows = block.read()
    values = sequence_fingerprints(rows)
    counts = rows["input_mask"].max(axis=1, initial=0)
    row = np.repeat(np.arange(len(counts)), counts)
    number = ranges(np.ones_like(counts, np.int64), counts)
    chosen = np.flatnonzero(bucket_of(values) == bucket)
    return [(int(values[index]), f"{block.row_name(row[index])}, sequence {number[index]}") for index in chosen]


def first_unmatched(in_packed: list[tuple[int, str]], in_unpacked: list[tuple[int, str]]) -> str:
    """The first sequence that one list of fingerprints and names holds more often than the other."""
    for ours, theirs, other in ((in_packed, in_unpacked, "unpacked"), (in_unpacked, in_packed, "packed")):
        unmatched = Counter(value for value, _ in theirs)
        for value, name in ours:
            if not unmatched[value]:
                return f"{name}: is not in the {other} set, or less often"
            unmatched[value] -= 1
    raise AssertionError("two multisets that differ have no difference")
