"""Verification of a packed set: each row by itself, the totals, and the sequences against the unpacked set."""

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.masking import ranges
from data.packing.blocks import Block, blocks_of, with_progress
from data.packing.checks import faults
from data.packing.fingerprints import bucket_of, bucket_sums, sequence_fingerprints
from data.packing.output import UNFINISHED
from data.shards import Shard, find_shards, metadata_path, read_rows, tokens_to_predict
from data.workers import open_pool


@dataclass
class Report:
    shards: int
    rows: int
    sequences: int = 0  # in rows without fault
    faults: int = 0
    first_fault: str = ""  # a description

    def add(self, count: int, first_fault: str) -> None:
        self.first_fault = self.first_fault or first_fault
        self.faults += count


def find_of_form(folder: str, packed: bool, flag: str) -> list[Shard]:
    """The shards of a folder; UserError naming `flag` where they are not packed, or not unpacked."""
    shards = find_shards(folder, flag=flag)
    if shards[0].packed != packed:
        raise UserError(f"{flag} {folder}: its shards are {shards[0].description}")
    return shards


def verify(packed: list[Shard], unpacked: list[Shard], n_processes: int, show_progress: bool) -> Report:
    """Check a packed set; with unpacked shards, also that both sets hold the same sequences."""
    report = Report(shards=len(packed), rows=sum(shard.rows for shard in packed))
    with open_pool(n_processes) as pool:
        run = partial(with_progress, pool, show_progress)
        sums = verify_rows(run, packed, report)
        check_totals(packed[0].path.parent, report)
        if unpacked and not report.faults:
            compare(run, packed, unpacked, sums, report)
    return report


def verify_rows(run, packed: list[Shard], report: Report) -> np.ndarray:
    """Check every row by itself; returns the bucket_sums of the sequences in rows without fault."""
    first = next(shard for shard in packed if shard.rows)
    cls_token = int(read_rows(first, ["input_ids"], slice(1))["input_ids"][0, 0])
    total = 0
    for faulty_rows, first_fault, sums in run("checking rows", check_block,
                                              [(block, cls_token) for block in blocks_of(packed)]):
        report.add(faulty_rows, first_fault)
        total += sums
    report.sequences = int(total[0].sum())
    return total


def check_block(block: Block, cls_token: int) -> tuple[int, str, np.ndarray]:
    """How many rows of a block have a fault, a description of the first, and the bucket_sums of the other rows."""
    rows = block.read()
    found = list(faults(rows, cls_token))
    if block.shard.rule:
        crowded = tokens_to_predict(block.shard, rows["input_mask"]) > block.shard.prediction_slots
        found.append(("has more tokens to predict than room for them", crowded))
    faulty = np.any([bad for _, bad in found], axis=0)
    description = ""
    if faulty.any():
        first = int(np.argmax(faulty))
        description = f"{block.row_name(first)}: {next(fault for fault, bad in found if bad[first])}"
    sound = {key: values[~faulty] for key, values in rows.items()}
    return np.count_nonzero(faulty), description, bucket_sums(sequence_fingerprints(sound))


def check_totals(folder: Path, report: Report) -> None:
    """Compare the set with its metadata, if there are any."""
    unfinished = Path(os.path.abspath(folder)) / UNFINISHED
    if unfinished.exists():
        report.add(1, f"{unfinished}: the packing of this folder was cut short")
    path = metadata_path(folder)
    if not path.exists() or report.faults:
        return
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        expected = metadata["new_number_of_samples"], metadata["original_number_of_samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the metadata of a packed set ({error!r})") from None
    if expected != (report.rows, report.sequences):
        report.add(1, f"{path}: says {expected[0]} rows and {expected[1]} sequences, the shards hold {report.rows} "
                      f"and {report.sequences}")


def compare(run, packed: list[Shard], unpacked: list[Shard], sums: np.ndarray, report: Report) -> None:
    """Count a fault for each bucket that differs, and name a sequence that only one of the sets has.

    Where possible, that is one that the packed set should not have.
    """
    if packed[0].rule != unpacked[0].rule:
        report.add(1, f"{packed[0].path} is {packed[0].description}, {unpacked[0].path} is {unpacked[0].description}")
        return
    original = sum(run("reading unpacked rows", sums_of_block, [(block,) for block in blocks_of(unpacked)]))
    different = np.flatnonzero((sums != original).any(axis=0))
    if not len(different):
        return
    surplus = (sums - original)[0].astype(np.int64)
    bucket = int(different[np.argmax(surplus[different])])
    in_packed, in_unpacked = (
        [found for part in run("finding the difference", members, [(block, bucket) for block in blocks_of(shards)])
         for found in part] for shards in (packed, unpacked))
    report.add(len(different), first_unmatched(in_packed, in_unpacked))


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
