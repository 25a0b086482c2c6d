"""Verify a packed data set, every row of it, and compare it with the unpacked set that it was made from.

    python3 pytorch_packed_data_checker.py --input_dir packed/phase1 \\
        --unpacked_dir hdf5_lower_case_1_seq_len_128/books_wiki_en_corpus

Exit code 0: no fault.  1: faults; the first is printed with its file and row, then their number.  2: the set could not
be checked, for example because a file is not a shard.
"""

import os

from common import cli
from common.errors import UserError
from data.packing.verify import find_of_form, packed_split, verify


def main(argv=None) -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", type=cli.path_or_url, required=True, help="folder of packed shards")
    parser.add_argument("--unpacked_dir", type=cli.path_or_url,
                        help="folder of the unpacked shards that were packed; both sets must hold the same sequences")
    parser.add_argument("--max_predictions_per_sequence", type=cli.positive_int,
                        help="the packer's flag of that name; an error where the rows have room for more (default: not "
                             "checked)")
    parser.add_argument("--allow_missing_tail", action="store_true",
                        help="accept that fewer rows are there than the metadata name, by less than a shard has: "
                             "packers of the reference drop the last, partial shard")
    parser.add_argument("--n_processes", type=cli.positive_int, default=min(4, os.cpu_count() or 1),
                        help="number of processes, each with less than 1 GB of memory")
    parser.add_argument("--disable_progress_bar", action="store_true", help="print no progress bars")
    args = parser.parse_args(argv)
    split = packed_split(args.input_dir)
    packed = find_of_form(args.input_dir, split, packed=True, flag="--input_dir")
    unpacked = find_of_form(args.unpacked_dir, split, packed=False, flag="--unpacked_dir") if args.unpacked_dir else []
    check_predictions(packed[0], args.max_predictions_per_sequence)
    report = verify(packed, unpacked, args.n_processes, show_progress=not args.disable_progress_bar,
                    allow_missing_tail=args.allow_missing_tail)
    checked = f"{args.input_dir}: {report.rows:,} rows in {report.shards:,} shards"
    if report.faults:
        print(f"{report.first_fault}\n{checked}: {report.faults:,} faults, the first is named above")
        return 1
    same = f", {'all of them in' if report.missing_rows else 'the same as in'} {args.unpacked_dir}" if unpacked else ""
    empty = f", {report.empty_rows:,} of them without a token" if report.empty_rows else ""
    missing = f" (the last {report.missing_rows:,} are missing, as allowed)" if report.missing_rows else ""
    print(f"{checked}{missing}{empty}, {report.sequences:,} sequences{same}: no fault")
    return 0


def check_predictions(shard, most: int | None) -> None:
    """UserError where the shards have room for more predictions a sequence than `most`, if that is given."""
    predictions = shard.prediction_slots - shard.max_sequences
    if most is not None and predictions > most:
        raise UserError(f"{shard.path}: made with {predictions} predictions a sequence, "
                        f"but --max_predictions_per_sequence is {most}")


if __name__ == "__main__":
    cli.run(main)
