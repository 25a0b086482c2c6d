"""HDF5 shards of training samples: the schema, and finding, reading and writing shards.  No torch here.

S = max_seq_length, P = max_predictions_per_seq, N = the most sequences in a packed row.  An unpacked row holds one
sequence; a packed one holds up to N, numbered 1, 2, … in input_mask.

Rows of either form can come without masks (--dynamic_masking): every token is shown, MASK_KEYS are absent, and the
file's attributes hold the MaskingRule and prediction_slots, the width that MASK_KEYS would have.  origin.py has what
says which vocabulary and text a shard was made of.

Rows of either form can come without a second segment (--no_nsp): next_sentence_labels is absent, and the attribute
no_nsp says so.

Training and evaluation read a shard of more than PIECE_BYTES of rows in pieces, so that its size does not decide how
much memory they take.
"""

import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from common.download import is_remote
from common.errors import UserError
from common.files import PatientFile, replacing
from data.masking import LONGEST_ROW, MOST_SEQUENCES, MaskingRule
from data.origin import UNKNOWN, Origin, vocabulary_of
from data.shard_cache import RemoteShard, local_copy
from data.shard_reader import IN_PROCESS
from data.vocabulary import Vocabulary, check_same_vocabulary

ROWS_PER_CHUNK = 1024  # HDF5 compresses and reads this many rows at a time
PIECE_BYTES = 2**27  # of rows in memory: above a shard of the packer; the order of the rows in training depends on it
MOST_COMPRESSED = 5000  # the largest compression ratio (gzip: about 1000, zstd: more)
DAMAGE = (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError)


@dataclass(frozen=True)
class Column:
    """A key of the schema, with dtype and width per row in each form (None = absent, "1" = one number)."""

    key: str
    unpacked: tuple[str, str] | None
    packed: tuple[str, str]
    meaning: str


SCHEMA = (
    #       key                     unpacked      packed
    Column("input_ids",             ("i4", "S"),  ("i4", "S"),    "token ids"),
    Column("input_mask",            ("i1", "S"),  ("i4", "S"),    "which sequence a token belongs to, 0 = padding"),
    Column("segment_ids",           ("i1", "S"),  ("i1", "S"),    "0 = [CLS] A [SEP], 1 = B [SEP]"),
    Column("positions",             None,         ("i4", "S"),    "position in its own sequence, from 0"),
    Column("masked_lm_positions",   ("i4", "P"),  ("i4", "P+N"),  "offset into the row, 0 = empty slot"),
    Column("masked_lm_ids",         ("i4", "P"),  ("i4", "P+N"),  "the token that stood there"),
    Column("next_sentence_positions", None,       ("i4", "N"),    "where each [CLS] stands"),
    Column("next_sentence_labels",  ("i1", "1"),  ("i1", "N"),    "1 = the second segment is a random one"),
    Column("next_sentence_weights", None,         ("i4", "N"),    "1 = a sequence, 0 = empty slot"),
)
MASK_KEYS = ("masked_lm_positions", "masked_lm_ids")
LABELS = "next_sentence_labels"
SLOTS = "prediction_slots"  # the attribute beside those of the rule
NO_NSP, WHOLE_WORD_MASK, CONTINUING = "no_nsp", "whole_word_mask", "continuing"  # attributes that not every shard has
SUFFIX = ".hdf5"  # of the names of shards
ROWS = " rows "  # in the name of a piece, after that of its file
PACKED_TEST = "mixed_strategies_test_part_"  # how the names of packed test shards begin, which nobody trains on
INDEX = "shard_index.json"  # beside the shards (shard_index.py)
METADATA_SUFFIX = "_metadata.json"  # of the packer's metadata, after the name of the set's folder
LARGEST_ATTRIBUTE = 60_000  # bytes; HDF5 takes less than 64 KiB


@dataclass(frozen=True)
class Objective:
    """What the rows of a set are made for; all shards of it have the same."""

    nsp: bool = True  # next sentence prediction: rows have two segments and a label
    whole_word_mask: bool = False  # the masks never cut a word

    @property
    def description(self) -> str:
        """What differs from the published BERT, in words."""
        return (", without next sentence prediction" * (not self.nsp)
                + ", whole words masked" * self.whole_word_mask)


@dataclass(frozen=True)
class Shard:
    """What the header of a shard file says; or a piece of one, which takes the place of a shard."""

    path: Path
    rows: int
    row_bytes: int  # of a row in memory
    packed: bool
    sequence_length: int
    prediction_slots: int  # P where unpacked, P + N where packed
    max_sequences: int  # N, 1 where unpacked
    rule: MaskingRule | None = None  # where the rows come without masks
    objective: Objective = Objective()
    origin: Origin = UNKNOWN  # without the tokens: read_origin has them
    first_row: int = 0  # in the file
    whole: bool = True  # its rows are all of the file
    source: str = ""  # the name of its set in a mixture
    remote: RemoteShard | None = None  # what `path` is, or will be, a copy of
    fingerprint: str = ""  # content_name(path) (origin.py), where the file need not be here
    sequences: int | None = None  # of a packed shard, where an index says it

    def piece(self, first_row: int, rows: int) -> "Shard":
        """So many rows of this shard from one of them on."""
        return replace(self, first_row=first_row, rows=rows, whole=self.whole and rows == self.rows)

    def pieces(self) -> list["Shard"]:
        """This shard in as few pieces of equal size as PIECE_BYTES allows: where it is not larger, itself."""
        most_rows = max(1, PIECE_BYTES // max(1, self.row_bytes))
        rows = -(-self.rows // max(1, -(-self.rows // most_rows)))
        return [self.piece(first, min(rows, self.rows - first)) for first in range(0, self.rows, rows or 1)] \
            or [self]

    @property
    def file_bytes(self) -> int:
        return self.remote.nbytes if self.remote else self.path.stat().st_size

    @property
    def nbytes(self) -> int:
        """Of its rows in memory."""
        return self.rows * self.row_bytes

    @property
    def name(self) -> str:
        """That of the file, and for a piece the numbers of its first and last row."""
        last_row = self.first_row + self.rows - 1
        return self.file_name if self.whole else f"{self.file_name}{ROWS}{self.first_row} to {last_row}"

    @property
    def file_name(self) -> str:
        """In a mixture after the name of the set."""
        return f"{self.source}/{self.path.name}" if self.source else self.path.name

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(columns(self.packed, self.rule, self.objective.nsp))

    @property
    def description(self) -> str:
        """Its form in words: the same for all shards of a set."""
        packed = f"packed to {self.max_sequences} sequences a row" if self.packed else "unpacked"
        rule = f", {self.rule.description}" if self.rule else ""
        return (f"{packed}, {self.sequence_length} tokens and {self.prediction_slots} prediction slots a row{rule}"
                f"{self.objective.description}")

    def with_whole_words_masked(self) -> "Shard":
        """The shard, to be masked by words (--whole_word_mask of the training).  UserError where it cannot be."""
        if self.objective.whole_word_mask:
            return self
        if self.rule is None:
            raise UserError(f"{self.path}: its rows are masked already, token by token; --whole_word_mask is for rows "
                            f"without masks, or give it to create_hdf5_files, which made these")
        if not self.rule.continuing:
            raise UserError(f"{self.path}: does not say which tokens continue a word, as shards of earlier versions do "
                            f"not; make them anew (create_hdf5_files --dynamic_masking) for --whole_word_mask")
        return replace(self, rule=replace(self.rule, whole_word_mask=True),
                       objective=replace(self.objective, whole_word_mask=True))


def columns(packed: bool, rule: MaskingRule | None = None, nsp: bool = True) -> dict[str, tuple[str, str]]:
    """Dtype and width of each data set of a shard; with a `rule`, of one without masks."""
    forms = {column.key: column.packed if packed else column.unpacked for column in SCHEMA}
    return {key: form for key, form in forms.items()
            if form and not (rule and key in MASK_KEYS) and (nsp or key != LABELS)}


def metadata_path(folder) -> Path:
    """The packer's metadata file, beside the folder of the packed shards."""
    folder = Path(os.path.abspath(folder))
    return folder.parent / (folder.name + METADATA_SUFFIX)


def read_header(path) -> Shard:
    """Read the header of a shard; UserError where keys, dtypes or shapes are not those of the schema."""
    path = Path(path)
    try:
        size = path.stat().st_size
    except OSError:  # which opening it tells of
        size = 0
    return header_in(path, path, size)


def header_in(file_or_path, path: Path, file_bytes: int, with_lines: bool = False) -> Shard:
    """The same from an open file, of which a message says that it is `path`."""
    with opened(file_or_path, path) as file:
        packed = "next_sentence_positions" in file or "positions" in file
        rule, origin = rule_in(file.attrs), Origin.read(file.attrs, path, with_lines)
        objective = Objective(not file.attrs.get(NO_NSP, False), bool(file.attrs.get(WHOLE_WORD_MASK, False)))
        keys = columns(packed, rule, objective.nsp)
        missing = [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]
        if missing:
            raise UserError(f"{path}: no data set {', '.join(missing)} (a shard holds {', '.join(keys)})")
        shapes = {key: file[key].shape or () for key in keys}  # None where a data set is empty
        slots = int(file.attrs[SLOTS]) if rule else second_axis(shapes[MASK_KEYS[0]])
        not_integers = [key for key in keys if file[key].dtype.kind not in "iu"]
        size = sum(file[key].nbytes for key in keys)
    if not_integers:
        raise UserError(f"{path}: {not_integers[0]} holds no integers")
    if size > MOST_COMPRESSED * file_bytes:
        raise UserError(f"{path}: its header announces {size} bytes of rows, far more than its size allows")
    rows = shapes["input_ids"][0] if shapes["input_ids"] else 0
    shard = Shard(path=path, rows=rows, row_bytes=size // max(rows, 1), packed=packed,
                  sequence_length=second_axis(shapes["input_ids"]), prediction_slots=slots,
                  max_sequences=second_axis(shapes["next_sentence_positions"]) if packed else 1, rule=rule,
                  objective=objective, origin=origin)
    if rule and (shard.sequence_length > LONGEST_ROW or shard.max_sequences > MOST_SEQUENCES):
        raise UserError(f"{path}: rows of {shard.sequence_length} tokens and {shard.max_sequences} sequences without "
                        f"masks, but at most {LONGEST_ROW} tokens and {MOST_SEQUENCES} sequences can be masked later")
    for key in keys:
        expected = expected_shape(shard, key)
        if shapes[key] != expected:
            raise UserError(f"{path}: {key} has shape {shapes[key]}, expected {expected}")
    return shard


def read_origin(path) -> Origin:
    """What a shard says of its making, with the tokens of its vocabulary."""
    with opened(path) as file:
        return Origin.read(file.attrs, path, with_lines=True)


def full_vocabulary(shard: Shard, reader=IN_PROCESS) -> Vocabulary | None:
    """The vocabulary of the first shard of a set that names one, with its tokens where they are known."""
    return shard.origin.vocabulary if shard.remote else reader.call(read_origin, shard.path).vocabulary


def rule_in(attributes) -> MaskingRule | None:
    if SLOTS not in attributes:
        return None
    return MaskingRule(float(attributes["masked_lm_prob"]), int(attributes["max_predictions_per_seq"]),
                       int(attributes["vocab_size"]), tuple(int(number) for number in attributes["special_ids"]),
                       bool(attributes.get(WHOLE_WORD_MASK, False)), bytes(attributes.get(CONTINUING, b"")))


def second_axis(shape: tuple) -> int:
    return shape[1] if len(shape) > 1 else 0


def expected_shape(shard: Shard, key: str) -> tuple:
    width = columns(shard.packed)[key][1]
    sizes = {"S": shard.sequence_length, "P": shard.prediction_slots, "P+N": shard.prediction_slots,
             "N": shard.max_sequences}
    return (shard.rows,) if width == "1" else (shard.rows, sizes[width])


def find_shards(folder, split: str = "training", flag: str = "--input_dir", reader=IN_PROCESS,
                most_cached: int = 0) -> list[Shard]:
    """The shards of a folder, also a remote one, in the order of their names: the packed .hdf5 files (for training not
    those of PACKED_TEST), and the unpacked ones whose names contain `split` ("training" or "test").

    `reader` reads the headers: IN_PROCESS or a ShardReader.  Copies of remote shards may take `most_cached` bytes, 0 =
    what the disk has room for.  UserError where the folder is missing or has no shard,
    where a shard cannot be read, and where the shards are not all of one form and vocabulary; the message names `flag`.
    """
    shards, errors = find_readable_shards(folder, split, flag, reader, most_cached)
    if errors:
        raise errors[0]
    return shards


def find_readable_shards(folder, split: str = "training", flag: str = "--input_dir", reader=IN_PROCESS,
                         most_cached: int = 0) -> tuple[list[Shard], list[UserError]]:
    """The shards that find_shards would return, without those that cannot be read; and an error for each of these."""
    shards, errors = all_shards(folder, flag, reader, most_cached)
    shards = [shard for shard in shards if in_split(shard, split)]
    if not shards:
        raise errors[0] if errors else UserError(f"{flag} {folder}: no shard in it (packed .hdf5 files, or unpacked "
                                                 f"ones with '{split}' in the name)")
    for shard in shards:
        if shard.description != shards[0].description:
            raise UserError(f"{flag} {folder}: {shards[0].path.name} is {shards[0].description}, "
                            f"{shard.path.name} is {shard.description}")
        vocabulary, first = vocabulary_of(shards)
        check_same_vocabulary(shard.origin.vocabulary, f"{flag} {shard.path}", vocabulary, f"{first and first.path}")
    if not any(shard.rows for shard in shards):
        raise UserError(f"{flag} {folder}: no row in any of its {len(shards)} shards")
    return shards, errors


def all_shards(folder, flag: str, reader, most_cached: int) -> tuple[list[Shard], list[UserError]]:
    """The shards of a folder in the order of their names, and an error for each that cannot be read."""
    if is_remote(folder):
        from data.shard_index import remote_shards  # which reads headers as this file does

        return remote_shards(str(folder), flag, reader, most_cached)
    if not Path(folder).is_dir():
        raise UserError(f"{flag} {folder}: no such folder")
    shards, errors = [], []
    for path in sorted(Path(folder).glob(f"[!.]*{SUFFIX}")):  # macOS leaves files ._NAME beside those of that name
        try:
            shards.append(reader.call(read_header, path))
        except UserError as error:
            errors.append(error)
    return shards, errors


def in_split(shard: Shard, split: str) -> bool:
    if shard.packed:
        return split == "test" or not shard.path.name.startswith(PACKED_TEST)
    return split in shard.path.name


def read_rows(shard: Shard, keys=None, rows: slice | None = None) -> dict[str, np.ndarray]:
    """The rows of a shard or piece, or those of the slice `rows` of the file, in the dtypes of the file."""
    own = ... if shard.whole else slice(shard.first_row, shard.first_row + shard.rows)
    rows = own if rows is None else rows
    with local_copy(shard.remote, shard.path) if shard.remote else nullcontext(), opened(shard.path) as file:
        return {key: file[key][rows] for key in keys or shard.keys}


def count_sequences(shard: Shard) -> int:
    """The number of sequences in a packed shard or piece."""
    key = "next_sentence_weights"
    return int(np.count_nonzero(read_rows(shard, [key])[key]))


def write_shard(path, rows: dict[str, np.ndarray], rule: MaskingRule | None = None, prediction_slots: int = 0,
                objective: Objective = Objective(), origin: Origin = UNKNOWN) -> None:
    """Write a shard of either form; with a `rule`, one without masks."""
    with replacing(path) as temporary, created(temporary) as file:
        write_attributes(file, rule, prediction_slots, objective)
        origin.write(file.attrs)
        for key, (dtype, _) in columns("positions" in rows, rule, objective.nsp).items():
            chunk_rows = min(max(1, len(rows[key])), ROWS_PER_CHUNK)
            add_column(file, key, rows[key].shape, dtype, chunk_rows)[...] = rows[key]


@contextmanager
def writing(path, sequence_length: int, prediction_slots: int, rule: MaskingRule | None = None,
            objective: Objective = Objective(), origin: Origin = UNKNOWN):
    """Yield a function append(rows) that adds rows to an unpacked shard; with a `rule`, to one without masks.

    The shard appears under its name when the block ends without an error.
    """
    widths = {"1": (), "S": (sequence_length,), "P": (prediction_slots,)}
    with replacing(path) as temporary, created(temporary) as file:
        write_attributes(file, rule, prediction_slots, objective)
        origin.write(file.attrs)
        for key, (dtype, width) in columns(False, rule, objective.nsp).items():
            add_column(file, key, (0, *widths[width]), dtype, ROWS_PER_CHUNK)

        def append(rows: dict[str, np.ndarray]) -> None:
            for key, values in rows.items():
                before = len(file[key])
                file[key].resize(before + len(values), axis=0)
                file[key][before:] = values

        yield append


def write_attributes(file, rule: MaskingRule | None, prediction_slots: int, objective: Objective) -> None:
    if rule:
        file.attrs.update({name: value for name, value in asdict(rule).items()
                           if name not in (WHOLE_WORD_MASK, CONTINUING)} | {SLOTS: prediction_slots})
        if rule.continuing and (rule.whole_word_mask or len(rule.continuing) <= LARGEST_ATTRIBUTE):
            file.attrs[CONTINUING] = np.frombuffer(rule.continuing, np.uint8)
    if objective.whole_word_mask:
        file.attrs[WHOLE_WORD_MASK] = True
    if not objective.nsp:
        file.attrs[NO_NSP] = True


def add_column(file, key: str, shape: tuple, dtype: str, chunk_rows: int):
    """A new data set of a shard, which can grow.

    With byte shuffling and chunks of whole rows, files are a fifth smaller and read twice as fast as with h5py's
    defaults.
    """
    return file.create_dataset(key, shape, dtype, maxshape=(None, *shape[1:]), chunks=(chunk_rows, *shape[1:]),
                               shuffle=True, compression="gzip", compression_opts=1)


@contextmanager
def created(path):
    """Yield a new h5py.File; a full disk raises OSError when the block ends.

    A failing write must not reach HDF5 itself, which would crash the process while it closes the file.
    """
    with PatientFile(path, "w+") as raw:
        try:
            with h5py.File(raw, "w") as file:
                yield file
        finally:
            if raw.failure:
                raise OSError(raw.failure.errno, raw.failure.strerror, str(path)) from None


@contextmanager
def opened(file_or_path, path=None):
    """Yield the h5py.File of a shard.  UserError where it cannot be opened, or reading in the block fails."""
    path = path or file_or_path
    try:
        with h5py.File(file_or_path, "r", locking=False) as file:  # not every shared file system has locks
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except DAMAGE as error:
        raise UserError(f"{path}: not a readable HDF5 file ({type(error).__name__}: {error})") from None
