"""Blocks of rows: pieces of a data set that fit into memory, so that several processes can work on them."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.shards import Shard, read_rows
from data.workers import ordered_map

TOKENS_PER_BLOCK = 2**22  # a process holds one block (or output shard) at a time, up to 100 bytes a token


@dataclass(frozen=True)
class Block:
    number: int
    shard: Shard
    start: int
    stop: int

    def read(self, keys=None) -> dict[str, np.ndarray]:
        return read_rows(self.shard, keys, slice(self.start, self.stop))

    def row_name(self, index: int) -> str:
        return f"{self.shard.path}: row {self.start + index}"


def blocks_of(shards: list[Shard]) -> list[Block]:
    blocks = []
    for shard in shards:
        rows = max(1, TOKENS_PER_BLOCK // shard.sequence_length)
        for start in range(0, shard.rows, rows):
            blocks.append(Block(len(blocks), shard, start, min(start + rows, shard.rows)))
    return blocks


def with_progress(pool, show_progress: bool, description: str, function, tasks: list[tuple]) -> Iterator:
    """Yield function(*task) for each task, in order, with a progress bar."""
    with closing(ordered_map(pool, function, tasks)) as results:
        yield from tqdm(results, desc=description, total=len(tasks), disable=not show_progress)
