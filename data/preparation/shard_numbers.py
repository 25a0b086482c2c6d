"""How many shards a text becomes where nobody says, and how many an earlier stage made of it."""

import math
import re
from pathlib import Path

from common.errors import UserError
from data.preparation import layout, records

SHARD_BYTES = 4 << 20  # of text: random second segments come from blocks of this size (samples.READ_BYTES)
MOST_SHARDS = 256  # beyond 1 GB the shards grow
DOCUMENTS_PER_SHARD = 8  # at least, so that a shard has random second segments to choose from
FOLDER = re.compile(r"sharded_training_shards_(\d+)_test_shards_(\d+)_fraction_(.+)")


def numbers_for(texts: list[Path], fraction_test_set: float) -> tuple[int, int]:
    """The numbers of training and test shards for a text of one document a line."""
    size, documents = sum(path.stat().st_size for path in texts), sum(map(count_lines, texts))
    return fitting_numbers(size, documents, fraction_test_set)


def fitting_numbers(size: int, documents: int, fraction_test_set: float) -> tuple[int, int]:
    """
    >>> fitting_numbers(40 << 20, 10_000, 0.1), fitting_numbers(16 << 30, 6_000_000, 0.1), fitting_numbers(999, 9, 0.1)
    ((9, 1), (230, 26), (1, 1))
    """
    shards = max(2, min(MOST_SHARDS, math.ceil(size / SHARD_BYTES), documents // DOCUMENTS_PER_SHARD))
    test = min(shards - 1, max(1, round(shards * fraction_test_set)))
    return shards - test, test


def count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def numbers_made(dataset: str, fraction_test_set: float) -> tuple[int, int] | None:
    """The numbers of the shards that sharding made of this data set; None where it made none.

    Shards of a text that has changed since are passed over.  UserError where there are still several.
    """
    found = {}
    for folder in sorted(layout.working_folder().glob("sharded_*")):
        match, record = FOLDER.fullmatch(folder.name), records.read_record(folder, dataset)
        if match and record and match[3] == str(fraction_test_set):
            found[int(match[1]), int(match[2])] = record["inputs"]
    text = records.read_record(layout.formatted_folder(), dataset)
    current = {numbers for numbers, inputs in found.items() if text and text_of(inputs) == text_of(text["outputs"])}
    numbers = sorted(current or found)
    if len(numbers) > 1:
        raise UserError(f"--dataset {dataset}: it has shards in several numbers, {', '.join(map(str, numbers))}: say "
                        f"which with --n_training_shards and --n_test_shards")
    return numbers[0] if numbers else None


def text_of(files: dict) -> dict[str, int]:
    """The sizes of the files of a text, by their names below the folder of the formatted text."""
    return {name: properties["size"] for name, properties in files.items()}
