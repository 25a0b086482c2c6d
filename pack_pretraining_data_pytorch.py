"""Pack several sequences into each row of a pre-training data set, so that hardly any of a row is padding.

    python3 pack_pretraining_data_pytorch.py --input_dir hdf5_lower_case_1_seq_len_128/books_wiki_en_corpus \\
        --output_dir packed/phase1 --max_sequence_length 128 --max_predictions_per_sequence 20

Writes packed/phase1/mixed_strategies_part_N.hdf5 and packed/phase1_metadata.json.  Every sequence of the input ends in
exactly one row.  run_pretraining.py takes the folder as its --input_dir.
"""

import os
import shutil
import sys
import time
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, repeat
from pathlib import Path

import numpy as np
from tqdm import tqdm

import cli
import packing
import packing_shards
import shards
from file_utils import write_json
from processes import process_pool, sigterm_as_interrupt

PART_NAME = "mixed_strategies_part_{}.hdf5"
UNFINISHED = "packing_in_progress"  # the folder inside the output folder that holds everything until all is written


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", required=True,
                        help="folder of unpacked HDF5 shards, those with 'training' in the name")
    parser.add_argument("--output_dir", required=True,
                        help="folder for the packed shards; its metadata goes beside it, NAME_metadata.json")
    parser.add_argument("--max_sequence_length", type=cli.positive_int, required=True,
                        help="tokens in a row, as in the input")
    parser.add_argument("--max_predictions_per_sequence", type=cli.positive_int, required=True,
                        help="masked tokens in a packed row, beside one more for each of --max_sequences_per_pack")
    parser.add_argument("--max_sequences_per_pack", type=cli.positive_int, default=3, help="most sequences in a row")
    parser.add_argument("--packing_method", choices=packing.METHODS, default=packing.DEFAULT_METHOD,
                        help="how the rows are worked out; lpfhp: longest sequence first, into the fullest row")
    parser.add_argument("--seed", type=int, default=42, help="of the order of the rows")
    parser.add_argument("--n_processes", type=cli.positive_int, default=len(os.sched_getaffinity(0)),
                        help="processes, each under 1 GB; the result is the same for any number")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace the packed data in --output_dir, once the new is complete")
    parser.add_argument("--disable_progress_bar", action="store_true", help="print no progress bars")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_arguments(argv)
    output_dir = Path(os.path.abspath(args.output_dir))
    refuse_bad_folders(args, output_dir)
    found = find_unpacked(args)
    with sigterm_as_interrupt(), process_pool(args.n_processes) as run:
        progress = partial(tqdm, unit="block", disable=args.disable_progress_bar)
        blocks = packing_shards.blocks_of(found)
        surveys = list(progress(run(packing_shards.survey, blocks), desc="counting lengths", total=len(blocks)))
        histogram = sum(survey.histogram for survey in surveys)
        refuse_too_many_predictions(args, surveys)
        recipe = solve(args, histogram)
        with staged(output_dir) as folder:
            write_rows(args, run, progress, blocks, surveys, recipe, folder)
            publish(folder, output_dir)
    metadata = describe(args, found, histogram, recipe)
    write_json(metadata_path(output_dir), metadata)
    print(f"{metadata['original_number_of_samples']:,} sequences in {recipe.row_count:,} rows, "
          f"{metadata['packing_efficiency']:.3%} full, {metadata['avg_seq_per_sample']:.3f} sequences a row: "
          f"{args.output_dir}")


# --- what is refused before anything is written ---

def refuse_bad_folders(args, output_dir: Path) -> None:
    """An output folder inside the input folder, or one where packed data lies already."""
    if Path(args.input_dir).resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise cli.UserError(f"--output_dir {args.output_dir} lies inside --input_dir {args.input_dir}")
    if output_dir.exists() and not output_dir.is_dir():
        raise cli.UserError(f"--output_dir {args.output_dir}: not a folder")
    strangers = [path for path in output_dir.glob("*.hdf5") if path not in packed_parts(output_dir)]
    if strangers:
        raise cli.UserError(f"--output_dir {args.output_dir} holds a shard that is not of this command's making, "
                            f"{strangers[0].name}: choose another folder")
    present = [path for path in (*packed_parts(output_dir), output_dir / UNFINISHED, metadata_path(output_dir))
               if path.exists()]
    if present and not args.overwrite:
        raise cli.UserError(f"--output_dir {args.output_dir} is in use already ({present[0]}): choose another folder, "
                            "or give --overwrite to replace its packed data")


def packed_parts(output_dir: Path) -> list[Path]:
    return sorted(output_dir.glob(PART_NAME.format("*")))


def metadata_path(output_dir: Path) -> Path:
    return output_dir.with_name(f"{output_dir.name}_metadata.json")


def find_unpacked(args) -> list[shards.Shard]:
    found = shards.find(args.input_dir)
    for shard in found:
        if shard.packed:
            raise cli.UserError(f"{shard.path}: row 0 is packed already")
        if shard.sequence_length != args.max_sequence_length:
            raise cli.UserError(f"--max_sequence_length {args.max_sequence_length}, but {shard.path} has rows of "
                                f"{shard.sequence_length} tokens")
    return found


def refuse_too_many_predictions(args, surveys) -> None:
    """A packed row must hold the masked tokens of any sequences that may meet in it."""
    most_predictions = np.max([survey.most_predictions for survey in surveys], axis=0)
    most = int(packing.most_valuable_rows(most_predictions, args.max_sequences_per_pack)[-1])
    room = args.max_predictions_per_sequence + args.max_sequences_per_pack
    if most > room:
        raise cli.UserError(
            f"--max_predictions_per_sequence {args.max_predictions_per_sequence}: rows of up to "
            f"{args.max_sequences_per_pack} sequences can have {most} masked tokens, but hold {room}; "
            f"--max_predictions_per_sequence {most - args.max_sequences_per_pack} fits")


# --- the work ---

def solve(args, histogram: np.ndarray) -> packing.Recipe:
    start = time.perf_counter()
    recipe = packing.METHODS[args.packing_method](histogram, args.max_sequences_per_pack)
    print(f"{args.packing_method}: {recipe.row_count:,} rows with {len(recipe.rows):,} strategies in "
          f"{time.perf_counter() - start:.2f} s; no packing needs fewer than {recipe.bound:,}", file=sys.stderr)
    return recipe


@contextmanager
def staged(output_dir: Path):
    """Yield a new folder inside the output folder; afterwards it is gone, and so is an output folder left empty."""
    folder = output_dir / UNFINISHED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        if not any(output_dir.iterdir()):
            output_dir.rmdir()


def write_rows(args, run, progress, blocks, surveys, recipe, folder: Path) -> None:
    """Write the packed shards into `folder`, by way of temporary files there."""
    histogram = sum(survey.histogram for survey in surveys)
    ranks_before = accumulate((survey.histogram for survey in surveys[:-1]), initial=np.zeros_like(histogram))
    placement = packing_shards.Placement(recipe, histogram, args.seed)
    layout = packing_shards.Layout(recipe.row_count, args.max_sequence_length, args.max_sequences_per_pack,
                                   args.max_predictions_per_sequence, folder)
    list(progress(run(packing_shards.scatter, blocks, repeat(placement), ranks_before, repeat(layout)),
                  desc="sorting sequences into rows", total=len(blocks)))
    parts = range(layout.part_count)
    written = sum(progress(run(packing_shards.gather, parts, repeat(len(blocks)), repeat(layout),
                               [folder / PART_NAME.format(part) for part in parts]),
                           desc="writing shards", total=len(parts), unit="shard"))
    assert written == histogram.sum(), f"{written} sequences written of {histogram.sum()}"


def publish(folder: Path, output_dir: Path) -> None:
    """Put the finished shards in the place of what the output folder holds."""
    metadata_path(output_dir).unlink(missing_ok=True)
    for path in packed_parts(output_dir):
        path.unlink()
    for path in packed_parts(folder):
        os.replace(path, output_dir / path.name)


def describe(args, found, histogram: np.ndarray, recipe: packing.Recipe) -> dict:
    """The metadata: counts are of rows, sequences (samples) and tokens."""
    sequences, rows = int(histogram.sum()), recipe.row_count
    tokens = int(histogram @ np.arange(len(histogram)))
    return {
        "avg_seq_per_sample": sequences / rows,
        "compression_ratio": rows / sequences,
        "expected_speed_up": sequences / rows,
        "theoretical_speed_up": sequences * args.max_sequence_length / tokens,
        "new_number_of_samples": rows,
        "original_number_of_samples": sequences,
        "number_of_sequences_dropped": sequences - int(recipe.histogram(args.max_sequence_length).sum()),
        "number_of_strategies_utilized": len(recipe.rows),
        "packing_efficiency": tokens / (rows * args.max_sequence_length),
        "padding_tokens_original_dataset": sequences * args.max_sequence_length - tokens,
        "padding_tokens_packed_dataset": rows * args.max_sequence_length - tokens,
        "top_8_strategies": [list(strategy) for strategy, _ in recipe.rows.most_common(8)],
        "lower_bound_of_samples": recipe.bound,
        "packing_method": args.packing_method,
        "max_sequence_length": args.max_sequence_length,
        "max_sequences_per_pack": args.max_sequences_per_pack,
        "max_predictions_per_sequence": args.max_predictions_per_sequence,
        "seed": args.seed,
        "input_dir": args.input_dir,
        "input_files": [shard.path.name for shard in found],
    }


if __name__ == "__main__":
    cli.run(main)
