"""text_formatting: from dumps and books to text files of one document a line.

The input is cut into batches that the workers turn into lines.  A fixed number of batches makes a part file, which has
a record of its own: after an interruption the parts that are there are kept, and the stream is only read past them.
"""

from collections import Counter
from itertools import groupby

from cli import UserError
from data import records
from data.pool import ordered_map
from file_utils import replacing

BATCHES_PER_PART = 128  # about 128 MB of XML, 50 MB of text; what an interruption can cost
OPTIONS = {"batches_per_part": BATCHES_PER_PART}


def format_documents(folder, dataset: str, batches, work, inputs: dict, pool) -> dict:
    """Write the documents of all batches to folder/DATASET/part_N.txt and return the record.

    batches: an iterable of tasks; work(*task) gives (lines, counts).  inputs: fingerprints of what they come
    from.  Parts that are recorded as made from the same inputs are not made again.
    """
    old = records.forget(folder, dataset)
    (folder / dataset).mkdir(parents=True, exist_ok=True)
    outputs = {}
    for part, tasks in grouped(batches, BATCHES_PER_PART):
        name = f"{dataset}/part_{part:05d}.txt"
        record = records.done(folder, name, inputs, OPTIONS)
        if record:
            for _ in tasks:  # read past
                pass
        else:
            counts = write_part(folder / name, ordered_map(pool, work, tasks))
            record = records.write(folder, name, inputs, OPTIONS, {name: {}}, counts)
        outputs[name] = record["counts"]
    totals = sum((Counter(counts) for counts in outputs.values()), Counter())
    if not totals["articles"]:
        raise UserError(f"{', '.join(inputs)}: no document with text in it ({describe(totals)})")
    remove_stale(old, [folder / name for name in outputs])
    return records.write(folder, dataset, inputs, OPTIONS, outputs, dict(totals))


def grouped(items, size: int):
    """Yield (number, iterator over up to `size` items) until there are no more."""
    for number, group in groupby(enumerate(items), key=lambda pair: pair[0] // size):
        yield number, (item for _, item in group)


def write_part(path, results) -> dict:
    """Write the lines of the results to one file, whole or not at all; returns the sum of their counts."""
    totals = Counter()
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for lines, counts in results:
            file.writelines(line + "\n" for line in lines)
            totals.update(counts)
    return dict(totals)


def remove_stale(old, new) -> None:
    """Delete the files of an earlier record that this run did not make again."""
    for path in set(old) - set(new):
        path.unlink(missing_ok=True)


def describe(counts: dict) -> str:
    """{"articles": 106, "redirects": 100} as "106 articles, 100 redirects"."""
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in sorted(counts.items())) or "nothing"
