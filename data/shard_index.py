"""The index of a set of shards: what a run has to know of each before it reads a row.  No torch here.

Packing and data preparation write shard_index.json beside the shards, and an upload carries it.  A local folder is read
without it.  Of a remote folder it tells the rows, sizes and checksums at once; without one the header of each shard is
read by ranged requests.

    {"format": 1, "shards": [{"name", "bytes", "sha256", "rows", "row_bytes", "packed", "sequence_length",
     "prediction_slots", "max_sequences", "rule", "objective", "vocabulary", "texts", "fingerprint", "sequences"}, …],
     "vocabulary_lines": "[PAD]\\n…", "token_counts": "12 0 …"}
"""

import hashlib
import io
import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from common.download import file_checksum
from common.errors import UserError, whole_number
from common.files import write_json
from common.object_store import S3Folder, is_s3, patiently, remote_folder, small_copy
from data.masking import MaskingRule
from data.origin import HASHED_BYTES, Origin, content_name, name_of_ends
from data.shard_cache import RemoteShard, shared_folder
from data.shards import (
    INDEX,
    METADATA_SUFFIX,
    SUFFIX,
    Objective,
    Shard,
    count_sequences,
    header_in,
    in_split,
    read_header,
    read_origin,
    read_rows,
)
from data.token_counts import ROWS_CHECKED_FIRST, TOKEN_COUNTS, as_text, counts_in, summed_counts
from data.vocabulary import Vocabulary

FORMAT = 1
COUNTS = ("rows", "row_bytes", "sequence_length", "prediction_slots", "max_sequences")
HEADER_BYTES = 1 << 16  # of each end of a shard, read before its header is looked at
HEADERS_AT_ONCE = 16
FIRST_PATIENCE = 60.0  # seconds that a server may be away when a run starts


# --- writing ---

def write_index(folder) -> Path:
    """Write the index of a local folder beside its shards; returns its path.  UserError where a shard is damaged."""
    folder = Path(folder)
    write_json(folder / INDEX, index_of(folder))
    return folder / INDEX


def index_of(folder: Path) -> dict:
    paths = sorted(folder.glob(f"[!.]*{SUFFIX}"))
    if not paths:
        raise UserError(f"{folder}: no shard in it")
    shards = [read_header(path) for path in paths]
    vocabulary = next((read_origin(shard.path).vocabulary for shard in shards if shard.origin.vocabulary), None)
    lines = vocabulary.to_dict().get("lines") if vocabulary else None
    return {"format": FORMAT, "shards": [entry_of(shard) for shard in shards],
            **({"vocabulary_lines": lines} if lines is not None else {}),
            **token_counts([shard for shard in shards if in_split(shard, "training") and not shard.packed])}


def entry_of(shard: Shard) -> dict:
    """What the index says of a shard."""
    vocabulary = shard.origin.vocabulary
    identity = {key: value for key, value in vocabulary.to_dict().items() if key != "lines"} if vocabulary else None
    return {"name": shard.path.name, "bytes": shard.path.stat().st_size, "sha256": file_checksum(shard.path),
            "packed": shard.packed, **{name: getattr(shard, name) for name in COUNTS},
            "rule": rule_entry(shard.rule) if shard.rule else None, "objective": asdict(shard.objective),
            "vocabulary": identity, "texts": list(shard.origin.texts), "fingerprint": content_name(shard.path),
            **({"sequences": count_sequences(shard)} if shard.packed else {})}


def rule_entry(rule: MaskingRule) -> dict:
    return {**asdict(rule), "continuing": b64encode(rule.continuing).decode()}


def token_counts(shards: list[Shard]) -> dict[str, str]:
    """How often each token occurs in the rows that a run over a local folder counts itself."""
    counted, counts = 0, []
    for piece in (piece for shard in shards for piece in shard.pieces()):
        if counted >= ROWS_CHECKED_FIRST:
            break
        counts.append(counts_in(read_rows(piece)))
        counted += piece.rows
    return {TOKEN_COUNTS: as_text(summed_counts(counts))} if counts else {}


# --- reading ---

def remote_shards(url: str, flag: str, reader, most_cached: int) -> tuple[list[Shard], list[UserError]]:
    """The shards of a remote folder in the order of their names, and an error for each that cannot be read.

    The index and the packer's metadata are copied to where the shards will be.  UserError, naming `flag`, where the
    folder or its index cannot be read.
    """
    folder, local = remote_folder(url), copies_folder(url)
    read = partial(patiently, patience=FIRST_PATIENCE)
    index = read(lambda: small_copy(folder, INDEX, local / INDEX))
    parent, _, name = folder.url.rpartition("/")
    if not parent.endswith("/"):  # as that of a whole bucket does
        name += METADATA_SUFFIX
        read(lambda: small_copy(remote_folder(parent), name, local.with_name(local.name + METADATA_SUFFIX)))
    if index is not None:
        return shards_in(index, folder.url, f"{flag} {folder.url}/{INDEX}", most_cached), []
    if not is_s3(url):
        raise UserError(f"{flag} {url}: no {INDEX} in it: a folder on an http server cannot be listed")
    listed = {name: found for name, found in read(folder.names).items()
              if name.endswith(SUFFIX) and "/" not in name and not name.startswith(".")}
    remotes = [RemoteShard(folder.url, name, size, "", version, most_cached)
               for name, (size, version) in sorted(listed.items())]
    found = reader.call(read_remote_headers, url, remotes) if remotes else []
    return ([shard for shard in found if isinstance(shard, Shard)],
            [fault for fault in found if isinstance(fault, UserError)])


def copies_folder(url: str) -> Path:
    """Where the local copies of a remote folder are kept."""
    url = url.rstrip("/")
    return shared_folder() / f"{name_of(url)}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"


def name_of(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name or urlsplit(url).netloc


def shards_in(index: bytes, url: str, what: str, most_cached: int) -> list[Shard]:
    """The shards that an index names.  UserError, with `what`, where it is malformed."""
    try:
        values = json.loads(index)
        if values["format"] != FORMAT:
            raise UserError(f"{what}: of format {repr(values['format'])[:50]}, not {FORMAT}")
        shards = [shard_of(entry, url, what, most_cached) for entry in values["shards"]]
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{what}: not an index of shards ({error!r})") from None
    lines = values.get("vocabulary_lines")
    first = next((number for number, shard in enumerate(shards) if shard.origin.vocabulary), None)
    if isinstance(lines, str) and first is not None:  # with its tokens, on the shard that stands for all
        shard = shards[first]
        vocabulary = Vocabulary.from_dict(shard.origin.vocabulary.to_dict() | {"lines": lines}, what)
        shards[first] = replace(shard, origin=Origin(vocabulary, shard.origin.texts))
    return sorted(shards, key=lambda shard: shard.path.name)


def shard_of(entry: dict, url: str, what: str, most_cached: int) -> Shard:
    """The shard that an entry of an index describes."""
    name = str(entry["name"])
    if "/" in name or name.startswith(".") or not name.endswith(SUFFIX):
        raise UserError(f"{what}: {name[:100]!r} is not the name of a shard")
    rule, vocabulary = entry["rule"], entry["vocabulary"]
    sequences = whole_number(entry, "sequences", what) if "sequences" in entry else None
    remote = RemoteShard(url, name, whole_number(entry, "bytes", what), str(entry["sha256"]), "", most_cached)
    return Shard(
        path=copies_folder(url) / name, packed=bool(entry["packed"]),
        **{count: whole_number(entry, count, f"{what}: {name}") for count in COUNTS},
        rule=MaskingRule(**rule | {"special_ids": tuple(rule["special_ids"]),
                                   "continuing": b64decode(rule["continuing"], validate=True)}) if rule else None,
        objective=Objective(**entry["objective"]),
        origin=Origin(Vocabulary.from_dict(vocabulary, what) if vocabulary else None, tuple(entry["texts"])),
        remote=remote, fingerprint=str(entry["fingerprint"]), sequences=sequences)


# --- without an index ---

def read_remote_headers(url: str, remotes: list[RemoteShard]) -> list[Shard | UserError]:
    """The headers of shards on S3, by ranged requests: the ends of all first, several at a time."""
    folder = S3Folder(url)
    with ThreadPoolExecutor(HEADERS_AT_ONCE) as pool:
        files = list(pool.map(lambda remote: fault_or(lambda: RangedFile(folder, remote)), remotes))
    return [file if isinstance(file, UserError) else fault_or(partial(remote_header, file)) for file in files]


def fault_or(action: Callable):
    """The result of an action, or its UserError."""
    try:
        return action()
    except UserError as error:
        return error


class RangedFile(io.RawIOBase):
    """A remote file as h5py reads it: blocks are fetched when they are asked for, and kept."""

    def __init__(self, folder: S3Folder, remote: RemoteShard):
        self.folder, self.remote, self.position = folder, remote, 0
        self.blocks: dict[int, bytes] = {}
        self.ends = self.block(0)[:HASHED_BYTES], self.tail()

    def tail(self) -> bytes:
        start = max(0, self.remote.nbytes - HASHED_BYTES)
        return self.fetch(start, self.remote.nbytes)

    def fetch(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        content = patiently(lambda: self.folder.read(self.remote.name, start, stop), patience=FIRST_PATIENCE)
        if content is None or len(content) != stop - start:
            raise UserError(f"{self.remote.url}: {len(content or b'')} bytes received from {start} on, "
                            f"{stop - start} expected")
        return content

    def block(self, number: int) -> bytes:
        if number not in self.blocks:
            start = number * HEADER_BYTES
            self.blocks[number] = self.fetch(start, min(start + HEADER_BYTES, self.remote.nbytes))
        return self.blocks[number]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.remote.nbytes}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self.remote.nbytes - self.position))
        first, last = self.position // HEADER_BYTES, (self.position + wanted - 1) // HEADER_BYTES
        content = b"".join(self.block(number) for number in range(first, last + 1)) if wanted else b""
        start = self.position - first * HEADER_BYTES
        buffer[:wanted] = content[start:start + wanted]
        self.position += wanted
        return wanted


def remote_header(file: RangedFile) -> Shard:
    remote = file.remote
    shard = header_in(file, copies_folder(remote.folder) / remote.name, remote.nbytes, with_lines=True)
    return replace(shard, remote=remote, fingerprint=name_of_ends(remote.nbytes, *file.ends))
