"""Packing a data set: count the lengths, work out the recipe, write the packed shards and their metadata."""

import os
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import numpy as np

from common.download import is_remote
from common.errors import UserError
from common.locks import folder_lock
from common.object_locks import prefix_lock
from common.object_store import is_s3
from data import upload
from data.masking import MOST_SEQUENCES
from data.origin import Origin, texts_of, vocabulary_of
from data.packing import plot
from data.packing.assignment import RowAssignment
from data.packing.blocks import Block, blocks_of, with_progress
from data.packing.methods import METHODS
from data.packing.output import PART_NAMES, check_contents, check_outside, check_space, packing_figures, publish, staged
from data.packing.recipe import knapsack
from data.packing.scatter_gather import Layout, Survey, gather, scatter, survey, temporary_bytes
from data.shards import Shard, find_shards, full_vocabulary
from data.token_counts import TOKEN_COUNTS, as_text, summed_counts
from data.workers import open_pool

RECORDED_OPTIONS = ("packing_method", "max_sequences_per_pack", "max_sequence_length", "max_predictions_per_sequence",
                    "seed", "input_dir")  # in the metadata


@dataclass(frozen=True, kw_only=True)
class PackingOptions:
    """The flags of pack_pretraining_data_pytorch.py; its --help explains them."""

    input_dir: str
    split: str  # "training" or "test"
    output_dir: str
    max_sequence_length: int
    max_predictions_per_sequence: int | None  # becomes that of the input
    max_sequences_per_pack: int
    packing_method: str
    seed: int
    n_processes: int
    overwrite: bool
    plot: str | None
    disable_progress_bar: bool

    @property
    def prediction_slots(self) -> int:
        """Room for masked tokens in a packed row."""
        return self.max_predictions_per_sequence + self.max_sequences_per_pack


def pack(options: PackingOptions) -> dict:
    """Pack the shards of a folder; returns the metadata.  UserError, before anything is written, for bad input."""
    if is_s3(options.output_dir):
        return pack_to_url(options)
    output_dir = Path(os.path.abspath(options.output_dir))
    if not is_remote(options.input_dir):
        check_outside(output_dir, Path(options.input_dir))
    with folder_lock(output_dir, f"--output_dir {output_dir}"):
        return pack_into(output_dir, options)


def pack_to_url(options: PackingOptions) -> dict:
    """The same into object storage: packed here, then uploaded."""
    with prefix_lock(options.output_dir, f"--output_dir {options.output_dir}"):
        upload.check_empty(options.output_dir, options.overwrite)
        with upload.staging_folder(options.output_dir) as folder:
            metadata = pack_into(folder, options)
            upload.upload_set(folder, options.output_dir, options.overwrite, not options.disable_progress_bar)
    return metadata


def pack_into(output_dir: Path, options: PackingOptions) -> dict:
    check_contents(output_dir, options.split, options.overwrite)
    shards = find_unpacked(options)
    if options.max_predictions_per_sequence is None:
        options = replace(options, max_predictions_per_sequence=shards[0].prediction_slots)
    blocks = blocks_of(shards)
    with open_pool(options.n_processes) as pool:
        run = partial(with_progress, pool, not options.disable_progress_bar)
        surveys = list(run("counting lengths", survey, [(block,) for block in blocks]))
        check_predictions_fit(options, surveys)
        histogram = sum(survey.histogram for survey in surveys)
        start = time.perf_counter()
        recipe = METHODS[options.packing_method].solve(histogram, options.max_sequences_per_pack)
        print(f"{options.packing_method}: {recipe.row_count:,} rows by {len(recipe.rows):,} strategies, computed in "
              f"{time.perf_counter() - start:.2f} s; no packing has fewer than {recipe.bound:,}", file=sys.stderr)
        metadata = (packing_figures(recipe, histogram, options.max_sequences_per_pack)
                    | {name: getattr(options, name) for name in RECORDED_OPTIONS}
                    | {"input_files": [shard.path.name for shard in shards]})
        with staged(output_dir) as folder:
            layout = Layout(row_count=recipe.row_count, row_length=options.max_sequence_length,
                            max_sequences=options.max_sequences_per_pack, prediction_slots=options.prediction_slots,
                            folder=folder, part_name=PART_NAMES[options.split], rule=shards[0].rule,
                            objective=shards[0].objective, origin=merged_origin(shards))
            counts = write_rows(run, blocks, surveys, RowAssignment(recipe, histogram, options.seed), layout)
            publish(folder, output_dir, options.split, metadata | {TOKEN_COUNTS: as_text(counts)})
    if options.plot:
        plot.plot_packing(recipe, histogram, options.plot)
    return metadata


def find_unpacked(options: PackingOptions) -> list[Shard]:
    shards = find_shards(options.input_dir, options.split)
    first = shards[0]
    if first.packed:
        raise UserError(f"--input_dir {options.input_dir}: {first.path} is packed already")
    if first.sequence_length != options.max_sequence_length:
        raise UserError(f"--max_sequence_length {options.max_sequence_length}, but {first.path} has rows of "
                        f"{first.sequence_length} tokens")
    if first.rule and options.max_sequences_per_pack > MOST_SEQUENCES:
        raise UserError(f"--max_sequences_per_pack {options.max_sequences_per_pack}: rows without masks, as those "
                        f"of {first.path}, can hold {MOST_SEQUENCES} sequences at most")
    return shards


def merged_origin(shards: list[Shard]) -> Origin:
    """The vocabulary and the texts of all shards together."""
    _, shard = vocabulary_of(shards)
    return Origin(shard and full_vocabulary(shard), tuple(sorted(texts_of(shards))))


def check_predictions_fit(options: PackingOptions, surveys: list[Survey]) -> None:
    """UserError where sequences that may share a row have more masked tokens than it has room for."""
    depth = options.max_sequences_per_pack
    most_predictions = np.max([survey.most_predictions for survey in surveys], axis=0)
    most = int(knapsack(most_predictions, depth)[0][-1])
    if most > options.prediction_slots:
        raise UserError(f"--max_predictions_per_sequence {options.max_predictions_per_sequence}: a row of up to "
                        f"{depth} sequences can have {most} masked tokens, but has room for "
                        f"{options.prediction_slots}; "
                        f"--max_predictions_per_sequence {most - depth} fits")


def write_rows(run, blocks: list[Block], surveys: list[Survey], assignment: RowAssignment,
               layout: Layout) -> np.ndarray:
    """Write the packed shards and the temporary files into the layout's folder; how often each token occurs."""
    check_space(temporary_bytes(surveys, layout.part_count), layout.folder)
    ranks_before = accumulate((survey.histogram for survey in surveys), initial=np.zeros_like(assignment.histogram))
    list(run("placing sequences", scatter,
             [(block, assignment, ranks, layout) for block, ranks in zip(blocks, ranks_before, strict=False)]))
    written, counts = zip(*run("writing shards", gather,
                               [(part, len(blocks), layout, layout.part_file(part))
                                for part in range(layout.part_count)]), strict=True)
    expected = assignment.histogram.sum()
    assert sum(written) == expected, f"{sum(written)} sequences written, {expected} in the input"
    return summed_counts(counts)
