"""Data sets in object storage: uploading one with its index, and verifying it there.  No torch here.

The index is uploaded last and removed first, so that it never names shards that are not there.
"""

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.download import file_checksum
from common.errors import UserError
from common.files import cache_folder
from common.object_store import SHA256, S3Folder, patiently, remote_folder
from common.remote_sources import Interrupted, remote_source
from data.shard_cache import RemoteShard
from data.shard_index import shards_in, write_index
from data.shards import INDEX, METADATA_SUFFIX, SUFFIX, metadata_path

FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Upload:
    """What an upload did."""

    files: int
    nbytes: int
    skipped: int  # were there already, byte for byte


def upload_set(folder, url: str, overwrite: bool, show_progress: bool) -> Upload:
    """Upload the shards of a local folder, the packer's metadata beside it, and a new index.

    An upload that was interrupted goes on where it stopped.  UserError, before anything is changed, where other shards
    are at the URL and `overwrite` is not given.
    """
    folder, target = Path(folder), S3Folder(url)
    index = write_index(folder)
    present = patiently(target.names)
    paths = sorted(folder.glob(f"[!.]*{SUFFIX}"))
    check_target(target, present, [path.name for path in paths], overwrite)
    target.end_abandoned_uploads()
    changed = [path for path in paths if not is_there(target, present, path)]
    metadata = metadata_path(folder)
    if changed and INDEX in present:
        target.delete([INDEX])
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(tqdm(pool.map(partial(upload_file, target), changed), total=len(changed), unit="shard",
                  desc=f"uploading to {url}", disable=not show_progress))
    if metadata.is_file():
        parent, _, name = target.url.rpartition("/")
        upload_file(S3Folder(parent), metadata, name + METADATA_SUFFIX)
    target.delete(shards_at(present) - {path.name for path in paths})
    upload_file(target, index)
    return Upload(len(changed), sum(path.stat().st_size for path in changed), len(paths) - len(changed))


def check_empty(url: str, overwrite: bool) -> None:
    """UserError where there is something at a URL that a set may not replace."""
    target = S3Folder(url)
    present = patiently(target.names)
    check_target(target, present, [], overwrite)
    if INDEX in present and not overwrite:
        raise UserError(f"{url}: holds a set already: choose another prefix, or give --overwrite to replace it")


@contextmanager
def staging_folder(url: str):
    """Yield a local folder in which a set for this URL is made, and remove it."""
    place = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = cache_folder() / "outputs" / f"{url.rstrip('/').rpartition('/')[2]}-{place}"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        metadata_path(folder).unlink(missing_ok=True)


def shards_at(present: dict) -> set[str]:
    return {name for name in present if name.endswith(SUFFIX) and "/" not in name}


def check_target(target: S3Folder, present: dict, names: list[str], overwrite: bool) -> None:
    """UserError where the URL holds shards of another set, or objects below it that are nobody's shards."""
    foreign = sorted(name for name in present if name not in (INDEX, *names) and not name.startswith("."))
    others = [name for name in foreign if name not in shards_at(present)]
    if others or (foreign and not overwrite):
        raise UserError(f"{target.url}: holds {(others or foreign)[0]}, which is none of the set's files: choose "
                        f"another prefix{'' if others else ', or give --overwrite to replace what is there'}")


def is_there(target: S3Folder, present: dict, path: Path) -> bool:
    """Whether an object is this file, byte for byte, as it was uploaded by this program."""
    if path.name not in present or present[path.name][0] != path.stat().st_size:
        return False
    head = patiently(lambda: target.head(path.name))
    return bool(head) and head["Metadata"].get(SHA256) == file_checksum(path)


def upload_file(target: S3Folder, path: Path, name: str = "") -> None:
    patiently(lambda: target.upload(path, name or path.name, {SHA256: file_checksum(path)}))


def verify_set(url: str, show_progress: bool) -> tuple[int, int, Iterator[str]]:
    """The number of shards that the index at a URL names, their bytes, and the faults, which are found one by one.

    Every byte is read.  UserError where there is no index.
    """
    folder = remote_folder(url)
    found = patiently(lambda: folder.read_unless(INDEX, ""))
    if found is None:
        raise UserError(f"{url}: no {INDEX} in it: upload_shards.py writes it")
    remotes = [shard.remote for shard in shards_in(found[0], folder.url, f"{url}/{INDEX}", 0)]
    return len(remotes), sum(remote.nbytes for remote in remotes), faults_of(folder, remotes, show_progress)


def faults_of(folder, remotes: list[RemoteShard], show_progress: bool) -> Iterator[str]:
    if isinstance(folder, S3Folder):
        unnamed = shards_at(patiently(folder.names)) - {remote.name for remote in remotes}
        yield from (f"{folder.url}/{name}: the index does not name it" for name in sorted(unnamed))
    with ThreadPoolExecutor(FILES_AT_ONCE * 4) as pool:
        found = tqdm(pool.map(remote_fault, remotes), total=len(remotes), unit="shard", desc="verifying",
                     disable=not show_progress)
        yield from filter(None, found)


def remote_fault(remote: RemoteShard) -> str | None:
    """What is wrong with a remote file, or None."""
    try:
        size, sha256 = patiently(lambda: remote_checksum(remote))
    except UserError as error:
        return str(error)
    if size != remote.nbytes:
        return f"{remote.url}: {size} bytes, {remote.nbytes} in the index"
    return None if sha256 == remote.sha256 else f"{remote.url}: its sha256 is {sha256}, {remote.sha256} in the index"


def remote_checksum(remote: RemoteShard) -> tuple[int, str]:
    reply, size, digest = remote_source(remote.url).open(0), 0, hashlib.sha256()
    for block in reply.blocks:
        digest.update(block)
        size += len(block)
    if reply.size is not None and size != reply.size:
        raise Interrupted(f"{remote.url}: {size} bytes received, {reply.size} announced")
    return size, digest.hexdigest()
