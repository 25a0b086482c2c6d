"""The order of the rows, as a pure function of the seed.  No torch here.

An epoch is the shards in a shuffled order, the rows of each shuffled; epochs follow one another without a gap.  So a
run resumes anywhere from one number, and every row is used once an epoch for any number of ranks.
"""

import numpy as np


def shard_order(seed: int, epoch: int, shard_count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(shard_count)


def row_order(seed: int, epoch: int, shard: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, shard]).permutation(rows)


def rows_of_epoch(rows_per_shard: list[int], skipped_shards: dict[int, tuple[int, int]], epoch: int) -> list[int]:
    """How many rows of each shard an epoch uses.

    `skipped_shards` is {shard: (epoch, rows)}: in that epoch only so many rows of the shard are used, and none later.

        >>> [rows_of_epoch([7, 5], {1: (2, 3)}, epoch) for epoch in (1, 2, 3)]
        [[7, 5], [7, 3], [7, 0]]
    """
    rows = list(rows_per_shard)
    for shard, (last_epoch, last_rows) in skipped_shards.items():
        if epoch >= last_epoch:
            rows[shard] = last_rows if epoch == last_epoch else 0
    return rows


def locate(rows_per_shard: list[int], skipped_shards: dict[int, tuple[int, int]], row: int) -> tuple[int, int]:
    """The epoch of a row of the endless sequence, and its number within that epoch."""
    epoch = 0
    for change in sorted({epoch + more for epoch, _ in skipped_shards.values() for more in (0, 1)}):
        size = sum(rows_of_epoch(rows_per_shard, skipped_shards, epoch))  # the same for all epochs before the change
        if row < (change - epoch) * size:
            break
        row -= (change - epoch) * size
        epoch = change
    more, number = divmod(row, sum(rows_of_epoch(rows_per_shard, skipped_shards, epoch)))
    return epoch + more, number


def row_ranges(seed: int, rows_per_shard: list[int], first: int, count: int,
               skipped_shards: dict[int, tuple[int, int]]) -> list[tuple[int, int, int, int]]:
    """Rows first … first+count−1 of the endless sequence as ranges (epoch, shard, start, stop) of its row_order.
    Skipping a shard does not change the order of the others.

        >>> row_ranges(seed=1, rows_per_shard=[3], first=2, count=5, skipped_shards={})
        [(0, 0, 2, 3), (1, 0, 0, 3), (2, 0, 0, 1)]
    """
    epoch, offset = locate(rows_per_shard, skipped_shards, first)
    found = []
    while count:
        rows = rows_of_epoch(rows_per_shard, skipped_shards, epoch)
        for shard in shard_order(seed, epoch, len(rows)).tolist():
            taken = min(max(0, rows[shard] - offset), count)
            if taken:
                found.append((epoch, shard, offset, offset + taken))
            offset = max(0, offset - rows[shard])
            count -= taken
        epoch += 1
    return found
