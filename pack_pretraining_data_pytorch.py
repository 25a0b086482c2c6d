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
from contextlib import closing, contextmanager, suppress
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from common import cli
from common.errors import UserError
from common.files import write_json
from data.masking import MOST_SEQUENCES
from data.packing import plot as packing_plot
from data.packing import scatter_gather as packing_shards
from data.packing.assignment import RowAssignment
from data.packing.methods import METHODS
from data.packing.recipe import Recipe, knapsack
from data.shards import Shard, find_shards, metadata_path
from data.workers import open_pool, ordered_map

PART_NAME = "mixed_strategies_part_{}.hdf5"
UNFINISHED = "packing_in_progress"  # the folder inside the output folder that holds everything until all is written


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--input_dir", required=True,
                        help="folder of unpacked HDF5 shards: those with 'training' in the name")
    parser.add_argument("--output_dir", required=True,
                        help="folder for the packed shards; its metadata goes beside it, NAME_metadata.json")
    parser.add_argument("--max_sequence_length", type=cli.positive_int, required=True,
                        help="tokens in a row, packed or not")
    parser.add_argument("--max_predictions_per_sequence", type=cli.positive_int, required=True,
                        help="masked tokens that a packed row has room for, beside one for each of "
                             "--max_sequences_per_pack")
    parser.add_argument("--max_sequences_per_pack", type=cli.positive_int, default=3, help="most sequences in a row")
    parser.add_argument("--packing_method", choices=METHODS, default=next(iter(METHODS)),
                        help="how the rows are worked out. "
                             + "; ".join(f"{method.name}: {method.help}" for method in METHODS.values()))
    parser.add_argument("--seed", type=int, default=42, help="of the order of the rows, and of which sequences meet")
    parser.add_argument("--n_processes", type=cli.positive_int, default=min(4, os.cpu_count() or 1),
                        help="processes, each below 1 GB of memory; the result is the same for any number")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace the packed data of --output_dir, once the new is complete")
    parser.add_argument("--plot", metavar="FILE.png", help="draw lengths, fill and sequences a row")
    parser.add_argument("--disable_progress_bar", action="store_true", help="print no progress bars")
    args = parser.parse_args(argv)
    method = METHODS[args.packing_method]
    if not method.supports(args.max_sequences_per_pack):
        parser.error(f"--packing_method {method.name} packs at most {method.max_depth} sequences a row, "
                     f"--max_sequences_per_pack is {args.max_sequences_per_pack}: choose another method")
    return args


def main(argv=None) -> None:
    args = parse_arguments(argv)
    output_dir = Path(os.path.abspath(args.output_dir))
    refuse_bad_folders(args, output_dir)
    found = find_unpacked(args)
    with cli.sigterm_as_interrupt(), open_pool(args.n_processes) as pool:
        work = partial(with_progress, pool, not args.disable_progress_bar)
        blocks = packing_shards.blocks_of(found)
        surveys = work("counting lengths", packing_shards.survey, [(block,) for block in blocks])
        refuse_too_many_predictions(args, surveys)
        histogram = sum(survey.histogram for survey in surveys)
        recipe = solve(args, histogram)
        with staged(output_dir) as folder:
            write_rows(args, work, blocks, surveys, recipe, folder, found[0].rule)
            publish(folder, output_dir)
            write_json(metadata_path(output_dir), metadata(args, found, histogram, recipe))
    if args.plot:
        packing_plot.draw(recipe, histogram, args.plot)
    print(summary(args, histogram, recipe))


def with_progress(pool, visible: bool, description: str, function, tasks: list[tuple]) -> list:
    """The results of function(*task) for all tasks, in order, with a bar while they are worked on."""
    with closing(ordered_map(pool, function, tasks)) as results:
        return list(tqdm(results, desc=description, total=len(tasks), disable=not visible))


# --- what is refused before anything is written ---

def refuse_bad_folders(args, output_dir: Path) -> None:
    """An output folder inside the input folder, one that is no folder, or one that holds shards already."""
    if Path(args.input_dir).resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise UserError(f"--output_dir {args.output_dir} lies inside --input_dir {args.input_dir}: choose another")
    if output_dir.exists() and not output_dir.is_dir():
        raise UserError(f"--output_dir {args.output_dir} is not a folder")
    strangers = sorted(set(output_dir.glob("*.hdf5")) - set(packed_parts(output_dir)))
    if strangers:
        raise UserError(f"--output_dir {args.output_dir} holds {strangers[0].name}, which this command did not write: "
                        "choose another folder")
    present = [path for path in (*packed_parts(output_dir), output_dir / UNFINISHED, metadata_path(output_dir))
               if path.exists()]
    if present and not args.overwrite:
        raise UserError(f"--output_dir {args.output_dir} is in use already ({present[0]}): choose another folder, or "
                        "give --overwrite to replace its packed data")


def packed_parts(folder: Path) -> list[Path]:
    return sorted(folder.glob(PART_NAME.format("*")))


def find_unpacked(args) -> list[Shard]:
    found = find_shards(args.input_dir)
    for shard in found:
        if shard.packed:
            raise UserError(f"--input_dir {args.input_dir}: {shard.path} is packed already, from row 0 on")
        if shard.sequence_length != args.max_sequence_length:
            raise UserError(f"--max_sequence_length {args.max_sequence_length}, but {shard.path} has rows of "
                            f"{shard.sequence_length} tokens")
        if shard.rule and args.max_sequences_per_pack > MOST_SEQUENCES:
            raise UserError(f"--max_sequences_per_pack {args.max_sequences_per_pack}: rows without masks, as those of "
                            f"{shard.path}, can hold {MOST_SEQUENCES} sequences at most")
    return found


def refuse_too_many_predictions(args, surveys: list[packing_shards.Survey]) -> None:
    """A packed row must hold the masked tokens of any sequences that may meet in it."""
    depth = args.max_sequences_per_pack
    most_predictions = np.max([survey.most_predictions for survey in surveys], axis=0)
    most = int(knapsack(most_predictions, depth)[0][-1])
    room = args.max_predictions_per_sequence + depth
    if most > room:
        raise UserError(f"--max_predictions_per_sequence {args.max_predictions_per_sequence}: a row of up to {depth} "
                        f"sequences can have {most} masked tokens, but has room for {room}; "
                        f"--max_predictions_per_sequence {most - depth} fits")


# --- the work ---

def solve(args, histogram: np.ndarray) -> Recipe:
    start = time.perf_counter()
    recipe = METHODS[args.packing_method].solve(histogram, args.max_sequences_per_pack)
    print(f"{args.packing_method}: {recipe.row_count:,} rows by {len(recipe.rows):,} strategies, worked out in "
          f"{time.perf_counter() - start:.2f} s; no packing has fewer than {recipe.bound:,}", file=sys.stderr)
    return recipe


@contextmanager
def staged(output_dir: Path):
    """Yield a new folder inside the output folder; afterwards it is gone, and so is an output folder left empty."""
    folder = output_dir / UNFINISHED
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error}; nothing new is kept there") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # it holds something, or could not be made
            output_dir.rmdir()


def write_rows(args, work, blocks, surveys, recipe: Recipe, folder: Path, rule) -> None:
    """Write the packed shards into `folder`, by way of temporary files there."""
    histogram = sum(survey.histogram for survey in surveys)
    assignment = RowAssignment(recipe, histogram, args.seed)
    layout = packing_shards.Layout(
        row_count=recipe.row_count, rows_per_part=packing_shards.rows_per_part(args.max_sequence_length),
        row_length=args.max_sequence_length, max_sequences=args.max_sequences_per_pack,
        max_predictions=args.max_predictions_per_sequence, folder=folder, rule=rule)
    reserve_space(packing_shards.temporary_bytes(surveys, layout.part_count), folder)

    ranks_before = accumulate((survey.histogram for survey in surveys), initial=np.zeros_like(histogram))
    work("placing sequences", packing_shards.scatter,
         [(block, assignment, ranks, layout) for block, ranks in zip(blocks, ranks_before, strict=False)])
    written = sum(work("writing shards", packing_shards.gather,
                       [(part, len(blocks), layout, folder / PART_NAME.format(part))
                        for part in range(layout.part_count)]))
    assert written == histogram.sum(), f"{written} sequences written, {histogram.sum()} in the input"


def reserve_space(needed: int, folder: Path) -> None:
    """Say what the temporary files will take, and refuse to start where the disk has less."""
    free = shutil.disk_usage(folder).free
    print(f"temporary files: {needed / 1e9:.2f} GB in {folder}, of {free / 1e9:.2f} GB free; removed at the end",
          file=sys.stderr)
    if needed > free:
        raise UserError(f"{folder}: {needed / 1e9:.2f} GB are needed for temporary files, {free / 1e9:.2f} GB are free")


def publish(folder: Path, output_dir: Path) -> None:
    """Put the finished shards in the place of what the output folder holds."""
    metadata_path(output_dir).unlink(missing_ok=True)
    for path in packed_parts(output_dir):
        path.unlink()
    for path in packed_parts(folder):
        os.replace(path, output_dir / path.name)


# --- what is told about the result ---

def metadata(args, found: list[Shard], histogram: np.ndarray, recipe: Recipe) -> dict:
    """Samples are rows: of one sequence before, of several after."""
    sequences, rows, row_length = int(histogram.sum()), recipe.row_count, args.max_sequence_length
    tokens = int(histogram @ np.arange(row_length + 1))
    return {
        "avg_seq_per_sample": sequences / rows,
        "compression_ratio": rows / sequences,
        "expected_speed_up": sequences / rows,
        "theoretical_speed_up": sequences * row_length / tokens,
        "new_number_of_samples": rows,
        "original_number_of_samples": sequences,
        "number_of_sequences_dropped": sequences - int(recipe.histogram(row_length).sum()),
        "number_of_strategies_utilized": len(recipe.rows),
        "packing_efficiency": tokens / (rows * row_length),
        "padding_tokens_original_dataset": sequences * row_length - tokens,
        "padding_tokens_packed_dataset": rows * row_length - tokens,
        "top_8_strategies": [list(strategy) for strategy, _ in recipe.rows.most_common(8)],
        "lower_bound_of_samples": recipe.bound,
        "packing_method": args.packing_method,
        "max_sequences_per_pack": args.max_sequences_per_pack,
        "max_sequence_length": row_length,
        "max_predictions_per_sequence": args.max_predictions_per_sequence,
        "seed": args.seed,
        "input_dir": args.input_dir,
        "input_files": [shard.path.name for shard in found],
    }


def summary(args, histogram: np.ndarray, recipe: Recipe) -> str:
    sequences, rows = int(histogram.sum()), recipe.row_count
    tokens = int(histogram @ np.arange(len(histogram)))
    return (f"{sequences:,} sequences in {rows:,} rows (no packing has fewer than {recipe.bound:,}): "
            f"{tokens / rows / args.max_sequence_length:.3%} real tokens, {sequences / rows:.3f} sequences a row, "
            f"in {args.output_dir}")


if __name__ == "__main__":
    cli.run(main)
