"""Rows a second that one process reads from shards into ready batches: unpacked at 128 tokens, with masks and without
(which then are made here, also of whole words, of which 15 % of the tokens are further pieces), packed at 512.

Shards of random words in the schema, gzip-compressed as the data preparation writes them, are made in a temporary
folder; then whole epochs are read, each by a fresh stream, waiting for every batch as a device of no cost would.

    python benchmarks/data_loading.py [--json]
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

from measuring import machine, report, spread  # puts the repository's root on the path

# isort: split
from common import cli
from data.shard_reader import ShardReader

VOCABULARY = 30522
PIECES = 0.15  # of its tokens continue a word


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=cli.positive_int, default=20_000, help="unpacked rows a shard")
    parser.add_argument("--shards", type=cli.positive_int, default=3, help="shards")
    parser.add_argument("--batch_size", type=cli.positive_int, default=64, help="rows a batch")
    parser.add_argument("--repeats", type=cli.positive_int, default=5, help="epochs read")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        write_unpacked(Path(folder) / "unpacked", args.shards, args.rows)
        write_unpacked(Path(folder) / "dynamic", args.shards, args.rows, dynamic=True)
        write_packed(Path(folder) / "packed", args.shards, args.rows // 4)
        with ShardReader() as reader:
            rounds = [[epoch_rate(Path(folder) / form, args.batch_size, reader, whole_words)
                       for form, whole_words in (("unpacked", False), ("dynamic", False), ("dynamic", True),
                                                 ("packed", False))] for _ in range(args.repeats)]
    unpacked, dynamic, whole_words, packed = map(spread, zip(*rounds, strict=True))
    ratio = spread([plain / whole for _, plain, whole, _ in rounds])
    figures = {"rows_per_second": unpacked["median"], "unpacked_128": unpacked, "dynamic_masking_128": dynamic,
               "whole_word_masking_128": whole_words, "time_of_whole_words_over_plain": ratio,
               "packed_512": packed, "batch_size": args.batch_size, "machine": machine("h5py", "numpy")}
    report(figures, args.json, [
        f"rows into batches of {args.batch_size}, one process, gzip-compressed shards",
        *(f"  {name}  {rate['median']:,.0f} rows/s ({rate['min']:,.0f} to {rate['max']:,.0f})"
          for name, rate in (("unpacked, 128 tokens       ", unpacked), ("the same, dynamic masking  ", dynamic),
                             ("the same, of whole words   ", whole_words), ("packed, 512 tokens         ", packed))),
        f"  whole words take {ratio['median']:.2f} times as long as plain dynamic masking ({ratio['min']:.2f} to "
        f"{ratio['max']:.2f})"])


def write_unpacked(folder: Path, count: int, rows: int, dynamic: bool = False) -> None:
    import numpy as np

    from data.masking import packed_bits
    from data.shards import write_shard
    from tests.support import synthetic

    pieces = packed_bits(np.random.default_rng(0).random(VOCABULARY) < PIECES)
    rule = replace(synthetic.rule(), continuing=pieces) if dynamic else None
    for number in range(count):
        rng = np.random.default_rng(number)
        values = synthetic.unpacked_rows(rng.integers(20, 129, rows), rng)
        write_shard(folder / f"part_training_{number}.hdf5", synthetic.without_masks(values) if dynamic else values,
                    rule, 20)


def write_packed(folder: Path, count: int, rows: int) -> None:
    """Rows of two sequences of 256 tokens each."""
    import numpy as np

    from data.shards import write_shard
    from tests.support import synthetic

    for number in range(count):
        one, other = (synthetic.unpacked_rows(np.full(rows, 256), np.random.default_rng([number, half]), 256, 40)
                      for half in (0, 1))
        join = {key: np.concatenate([one[key], other[key]], axis=1) for key in ("input_ids", "segment_ids")}
        shifted = np.where(other["masked_lm_positions"] > 0, other["masked_lm_positions"] + 256, 0)
        halves = np.arange(512) // 256
        write_shard(folder / f"part_{number}.hdf5", {
            **join, "input_mask": np.tile(halves + 1, (rows, 1)), "positions": np.tile(np.arange(512) % 256, (rows, 1)),
            "masked_lm_positions": np.concatenate([one["masked_lm_positions"], shifted], axis=1),
            "masked_lm_ids": np.concatenate([one["masked_lm_ids"], other["masked_lm_ids"]], axis=1),
            "next_sentence_positions": np.tile([0, 256], (rows, 1)),
            "next_sentence_labels": np.stack([one["next_sentence_labels"], other["next_sentence_labels"]], axis=1),
            "next_sentence_weights": np.ones((rows, 2), np.int32)})


def epoch_rate(folder: Path, batch_size: int, reader, whole_words: bool) -> float:
    """Rows a second of one epoch read by a new stream."""
    from data.dataloader import BatchStream
    from data.shards import find_shards
    from parallel.ranks import SingleRank
    from parallel.rendezvous import RankInfo

    found = find_shards(folder, reader=reader)
    found = [shard.with_whole_words_masked() for shard in found] if whole_words else found
    batches = sum(shard.rows for shard in found) // batch_size
    stream = BatchStream(found, batch_size, 1, VOCABULARY, ranks=SingleRank(RankInfo()), reader=reader)
    began = time.perf_counter()
    for _ in range(batches):
        next(stream)
    seconds = time.perf_counter() - began
    stream.close()
    return batches * batch_size / seconds


if __name__ == "__main__":
    cli.run(main)
