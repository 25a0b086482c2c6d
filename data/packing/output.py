"""The output folder of the packing: checks before, replacing its contents, and the metadata beside it."""

import os
import shutil
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import write_json
from data.packing.recipe import Recipe, reference_index
from data.shard_index import write_index
from data.shards import INDEX, PACKED_TEST, metadata_path

PART_NAMES = {"training": "mixed_strategies_part_{}.hdf5", "test": PACKED_TEST + "{}.hdf5"}  # by split
UNFINISHED = "packing_in_progress"  # the temporary folder inside the output folder


def packed_parts(folder: Path, split: str) -> list[Path]:
    return sorted(folder.glob(PART_NAMES[split].format("*")))


def check_outside(output_dir: Path, input_dir: Path) -> None:
    """UserError where the output folder is the input folder, or lies in it."""
    if input_dir.resolve() in (output_dir.resolve(), *output_dir.resolve().parents):
        raise UserError(f"--output_dir {output_dir} lies inside --input_dir {input_dir}: choose another")


def check_contents(output_dir: Path, split: str, overwrite: bool) -> None:
    """UserError where what is in the output folder must not be replaced."""
    foreign = sorted(set(output_dir.glob("*.hdf5")) - set(packed_parts(output_dir, split)))
    if foreign:
        raise UserError(f"--output_dir {output_dir} holds {foreign[0].name}, which this command did not write "
                        f"for --split {split}: choose another folder")
    present = [path for path in (*packed_parts(output_dir, split), output_dir / UNFINISHED, metadata_path(output_dir))
               if path.exists()]
    if present and not overwrite:
        raise UserError(f"--output_dir {output_dir} is in use already ({present[0]}): choose another folder, or "
                        "give --overwrite to replace its packed data")


@contextmanager
def staged(output_dir: Path):
    """Yield a temporary folder inside the output folder.  Removes it, and the output folder if that is left empty."""
    folder = output_dir / UNFINISHED
    try:
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: {error}; no new file is left there") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # it is not empty, or could not be made
            output_dir.rmdir()


def check_space(needed: int, folder: Path) -> None:
    """Print the size of the temporary files; UserError where the disk has less space."""
    free = shutil.disk_usage(folder).free
    print(f"temporary files: {needed / 1e9:.2f} GB in {folder}, of {free / 1e9:.2f} GB free; removed at the end",
          file=sys.stderr)
    if needed > free:
        raise UserError(f"{folder}: {needed / 1e9:.2f} GB are needed for temporary files, {free / 1e9:.2f} GB are free")


def publish(folder: Path, output_dir: Path, split: str, metadata: dict) -> None:
    """Replace the packed set in the output folder with the shards in `folder`.  Index and metadata are written last."""
    metadata_path(output_dir).unlink(missing_ok=True)
    (output_dir / INDEX).unlink(missing_ok=True)
    for path in packed_parts(output_dir, split):
        path.unlink()
    for path in packed_parts(folder, split):
        os.replace(path, output_dir / path.name)
    write_index(output_dir)
    write_json(metadata_path(output_dir), metadata)


def packing_figures(recipe: Recipe, histogram: np.ndarray, depth: int) -> dict:
    """The statistics in the metadata.  A sample is a row: of one sequence before packing, of several after it.

    What the reference's packer writes too means the same here.
    """
    sequences, rows, row_length = int(histogram.sum()), recipe.row_count, len(histogram) - 1
    tokens = int(histogram @ np.arange(row_length + 1))
    most_frequent = [strategy for strategy, _ in recipe.rows.most_common(8)]
    return {
        "avg_seq_per_sample": sequences / rows,
        "compression_ratio": 1 - rows / sequences,
        "expected_speed_up": sequences / rows,
        "theoretical_speed_up": sequences * row_length / tokens,
        "new_number_of_samples": rows,
        "original_number_of_samples": sequences,
        "number_of_sequences_dropped": sequences - int(recipe.histogram(row_length).sum()),
        "number_of_strategies_utilized": len(recipe.rows),
        "packing_efficiency": tokens / (rows * row_length),
        "padding_tokens_original_dataset": sequences * row_length - tokens,
        "padding_tokens_packed_dataset": rows * row_length - tokens,
        "top_8_strategies": [reference_index(strategy, row_length, depth) for strategy in most_frequent],
        "most_frequent_strategies": [list(strategy) for strategy in most_frequent],
        "rows_per_sequence": rows / sequences,
        "lower_bound_of_samples": recipe.bound,
    }
