"""How many rows and sequences the metadata of a packed set name, and how its shards differ from that.  No torch here.

Packers of the reference write whole files only: the rows of the last, partial one are named in the metadata, and
missing.
"""

import json

from common.errors import UserError
from data.shards import Shard, metadata_path


def named_totals(folder) -> tuple[int, int] | None:
    """(rows, sequences) by the metadata of a packed set; None where there are none.  UserError where they lack them.

    The sequences are those of a row times the rows: as original_number_of_samples, packers of the reference can give
    the number of files.
    """
    path = metadata_path(folder)
    if not path.exists():
        return None
    try:
        metadata = json.loads(path.read_bytes())
        rows, sequences = (int(metadata[f"{kind}_number_of_samples"]) for kind in ("new", "original"))
        return rows, round(rows * metadata["avg_seq_per_sample"]) if "avg_seq_per_sample" in metadata else sequences
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not the metadata of a packed set ({error!r})") from None


def difference_from_metadata(shards: list[Shard]) -> str | None:
    """In words, how the rows of a set's shards differ from those that its metadata name; None where they do not."""
    folder, held = shards[0].path.parent.resolve(), sum(shard.rows for shard in shards)
    try:
        named, _ = (shards[0].packed and named_totals(folder)) or (held, 0)
    except UserError:  # the training needs no more of the metadata than the sequences of a row
        return None
    what = f"{metadata_path(folder)}: names {named:,} rows, the shards hold {held:,}"
    if held > named:
        return f"{what}: are there shards of another set among them?"
    if lacks_tail(named, shards):
        return f"{what}: the last {named - held:,} are missing, as packers of the reference drop the last, partial file"
    return f"{what}: {named - held:,} are missing, as many as a whole shard has: is one lost?" if named > held else None


def lacks_tail(named: int, shards: list[Shard]) -> bool:
    """Whether rows are missing from a set, but fewer than its largest shard has."""
    return 0 < named - sum(shard.rows for shard in shards) < max(shard.rows for shard in shards)
