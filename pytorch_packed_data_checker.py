"""Verify a packed data set, every row of it, and compare it with the unpacked set that it was made from.

    python3 pytorch_packed_data_checker.py --input_dir packed/phase1 \\
        --unpacked_dir hdf5_lower_case_1_seq_len_128/books_wiki_en_corpus

Exit code 0: no fault.  1: faults; the first is named with its file and row, then their number.  2: it could not be
checked, for example because a file is not a shard.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli
from common.errors import UserError
from data.packing.checks import faults, fingerprints
from data.packing.scatter_gather import Block, blocks_of
from data.shard_checks import tokens_to_predict
from data.shards import Shard, find_shards, metadata_path, read_rows
from data.workers import open_pool, ordered_map
from pack_pretraining_data_pytorch import UNFINISHED

BUCKETS = 2**16  # fingerprints are compared by the sums of so many groups of them


@dataclass
class Report:
    """The faults found so far: what the first one is, and how many there are."""

    first: str = ""
    count: int = 0

    def add(self, count: int, fault: str) -> None:
        """Count faults; `fault` describes the first of them."""
        self.first = self.first or fault
        self.count += count


@dataclass
class Sequences:
    """The sequences of a set as a multiset: in each bucket of fingerprints, how many there are and their sum."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(BUCKETS, np.uint64))  # modulo 2**64

    def __add__(self, other: "Sequences") -> "Sequences":
        return Sequences(self.counts + other.counts, self.sums + other.sums)

    def differs_from(self, other: "Sequences") -> np.ndarray:
        """The buckets that do not hold the same sequences."""
        return np.flatnonzero((self.counts != other.counts) | (self.sums != other.sums))


def main(argv=None) -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", required=True, help="folder of packed shards")
    parser.add_argument("--unpacked_dir", help="folder of the unpacked shards that they hold")
    parser.add_argument("--n_processes", type=cli.positive_int, default=min(4, os.cpu_count() or 1),
                        help="processes, each below 1 GB of memory")
    parser.add_argument("--disable_progress_bar", action="store_true", help="print no progress bars")
    args = parser.parse_args(argv)
    packed = find(args.input_dir, packed=True, flag="--input_dir")
    unpacked = find(args.unpacked_dir, packed=False, flag="--unpacked_dir") if args.unpacked_dir else []
    report = Report()
    with open_pool(args.n_processes) as pool:
        def each(description, function, found, *more):
            blocks = blocks_of(found)
            results = ordered_map(pool, function, ((block, *more) for block in blocks))
            yield from tqdm(results, desc=description, total=len(blocks), disable=args.disable_progress_bar)

        sequences = check_rows(each, packed, report)
        check_totals(args.input_dir, packed, int(sequences.counts.sum()), report)
        if unpacked and not report.count:
            compare(each, packed, unpacked, sequences, report)
    rows = sum(shard.rows for shard in packed)
    checked = f"{args.input_dir}: {rows:,} rows in {len(packed):,} shards"
    if report.count:
        print(f"{report.first}\n{checked}: {report.count:,} faults, the first is named above")
        return 1
    same = f", the same as in {args.unpacked_dir}" if unpacked else ""
    print(f"{checked}, {sequences.counts.sum():,} sequences{same}: no fault")
    return 0


def find(folder, packed: bool, flag: str) -> list[Shard]:
    found = find_shards(folder, flag=flag)
    if found[0].packed != packed:
        raise UserError(f"{flag} {folder}: its shards are {found[0].description}")
    return found


def check_rows(each, packed: list[Shard], report: Report) -> Sequences:
    """Check every row by itself; returns the sequences of the rows without fault."""
    first = next(shard for shard in packed if shard.rows)
    cls_token = int(read_rows(first, ["input_ids"], slice(1))["input_ids"][0, 0])
    total = Sequences()
    for faulty_rows, fault, sequences in each("checking rows", check_block, packed, cls_token):
        if faulty_rows:
            report.add(faulty_rows, fault)
        total += sequences
    return total


def check_block(block: Block, cls_token: int) -> tuple[int, str, Sequences]:
    """How many rows of a block have a fault, the first of them in words, and the sequences of the others."""
    rows = read(block)
    faulty = np.zeros(block.stop - block.start, bool)
    first = (len(faulty), "")
    found = list(faults(rows, cls_token))
    if block.shard.rule:
        crowded = tokens_to_predict(block.shard, rows["input_mask"]) > block.shard.prediction_slots
        found.append(("has more tokens to predict than room for them", crowded))
    for fault, bad in found:
        if bad.any():
            faulty |= bad
            first = min(first, (int(np.argmax(bad)), fault), key=lambda found: found[0])
    sound = {key: values[~faulty] for key, values in rows.items()}
    return np.count_nonzero(faulty), f"{block.row(first[0])}: {first[1]}", in_buckets(fingerprints(sound))


def read(block: Block) -> dict[str, np.ndarray]:
    return read_rows(block.shard, rows=slice(block.start, block.stop))


def in_buckets(values: np.ndarray) -> Sequences:
    """Sort fingerprints into buckets by their lowest bits."""
    bucket = (values % np.uint64(BUCKETS)).astype(np.int64)
    sums = np.zeros(BUCKETS, np.uint64)
    np.add.at(sums, bucket, values)
    return Sequences(np.bincount(bucket, minlength=BUCKETS), sums)


def check_totals(input_dir, packed: list[Shard], sequences: int, report: Report) -> None:
    """Compare the set with its metadata, where there are any."""
    folder = Path(os.path.abspath(input_dir))
    if (folder / UNFINISHED).exists():
        report.add(1, f"{folder / UNFINISHED}: the packing of this folder was cut short")
    path = metadata_path(folder)
    if not path.exists() or report.count:
        return
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        expected = metadata["new_number_of_samples"], metadata["original_number_of_samples"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the metadata of a packed set ({error!r})") from None
    rows = sum(shard.rows for shard in packed)
    if expected != (rows, sequences):
        report.add(1, f"{path}: names {expected[0]} rows and {expected[1]} sequences, the shards hold {rows} and "
                      f"{sequences}")


# --- comparison with the unpacked set ---

def compare(each, packed, unpacked, sequences: Sequences, report: Report) -> None:
    """Count a fault for each bucket that differs, and name a sequence that only one set has: where possible, one that
    the packed set should not have.
    """
    if packed[0].rule != unpacked[0].rule:
        report.add(1, f"{packed[0].path} is {packed[0].description}, "
                      f"{unpacked[0].path} is {unpacked[0].description}")
        return
    original = sum(each("reading unpacked rows", sequences_in_block, unpacked), Sequences())
    different = sequences.differs_from(original)
    if not len(different):
        return
    surplus = sequences.counts[different] - original.counts[different]
    bucket = int(different[np.argmax(surplus)])
    in_packed = [found for part in each("looking for it", members, packed, bucket) for found in part]
    in_unpacked = [found for part in each("looking for it", members, unpacked, bucket) for found in part]
    report.add(len(different), first_difference(in_packed, in_unpacked))


def sequences_in_block(block: Block) -> Sequences:
    return in_buckets(fingerprints(read(block)))


def members(block: Block, bucket: int) -> list[tuple[int, str]]:
    """The fingerprints of one bucket, with the row and the sequence each belongs to."""
    rows = read(block)
    values = fingerprints(rows)
    counts = rows["input_mask"].max(axis=1, initial=0)
    row = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(values)) - (np.cumsum(counts) - counts)[row] + 1
    chosen = np.flatnonzero(values % np.uint64(BUCKETS) == bucket)
    return [(int(values[index]), f"{block.row(row[index])}, sequence {number[index]}") for index in chosen]


def first_difference(in_packed: list[tuple[int, str]], in_unpacked: list[tuple[int, str]]) -> str:
    """The first sequence that stands in one of two lists more often than in the other."""
    for ours, theirs, verdict in ((in_packed, in_unpacked, "is not in the unpacked set, or not so often"),
                                  (in_unpacked, in_packed, "is not in the packed set, or not so often")):
        missing = [value for value, _ in theirs]
        for value, name in ours:
            if value not in missing:
                return f"{name}: {verdict}"
            missing.remove(value)
    raise AssertionError("two multisets that differ have no difference")


if __name__ == "__main__":
    cli.run(main)
