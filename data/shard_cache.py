"""Local copies of remote shards, in a folder of bounded size that the processes of a server share.  No torch here.

    with local_copy(remote, path):      # fetched and verified, unless it is there
        …                               # and kept at least as long as this block lasts

Beside NAME lie .NAME.part while it is fetched, .NAME.verified (what was verified, and of which file), and .NAME.lock: a
process that fetches the shard holds it alone, those that read it hold it together, and nobody removes a shard that is
held.  The locks are the kernel's: they end with their process.  Where the file system has none, a shard can be fetched
twice, which costs time only.
"""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.cli import format_bytes
from common.download import file_checksum
from common.errors import UserError
from common.files import cache_folder, flocked, replacing, room_in_cache
from common.object_store import Cancelled, is_s3, patiently, remote_folder

MOST_OF_FREE = 0.9  # of the free space of the disk, where no bound is given
TRANSFERS_OF_WRONG_BYTES = 2  # of a shard whose bytes are not the expected ones, before that is an error
POLL_SECONDS = 0.1
SHARED_FOLDER = "shards"  # below the cache folder


@dataclass(frozen=True)
class RemoteShard:
    """A file in a remote folder, and how it is known to be the expected one."""

    folder: str  # its URL
    name: str
    nbytes: int
    sha256: str = ""  # "" where no index says it
    version: str = ""  # the ETag, where there is no index
    most_cached: int = 0  # bytes that all copies here may take; 0 = what the disk has room for

    @property
    def url(self) -> str:
        return f"{self.folder}/{self.name}"


class NoRoom(Exception):
    """There is no room for a shard without removing one that is needed sooner."""


@dataclass(frozen=True)
class Fetching:
    """How a shard is fetched: what else is needed, in that order; who is told of an outage; and what ends it."""

    needed: Sequence[Path] = ()
    warn: Callable[[str], None] | None = None
    stop: threading.Event | None = None


def shared_folder() -> Path:
    return cache_folder() / SHARED_FOLDER


@contextmanager
def local_copy(remote: RemoteShard, path: Path, fetching: Fetching = Fetching()):  # noqa: B008 (frozen)
    """A block in which the shard is at `path`.  UserError where it cannot be had, or is not the expected one."""
    while True:
        try:
            fetch_shard(remote, path, fetching)
        except NoRoom:  # until what other threads and processes fetch is there
            if fetching.stop and fetching.stop.is_set():
                raise Cancelled from None
            time.sleep(POLL_SECONDS)
            continue
        with locked(path, fcntl.LOCK_SH):
            if path.exists():  # not removed since it was fetched
                touch(path)
                yield
                return


def fetch_shard(remote: RemoteShard, path: Path, fetching: Fetching) -> None:
    """Fetch and verify a shard, unless a verified one is there."""
    if is_verified(remote, path):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path, fcntl.LOCK_EX):
        if path.exists() and (is_verified(remote, path) or is_expected(remote, path)):
            return
        for _ in range(TRANSFERS_OF_WRONG_BYTES):
            fault = transfer(remote, path, fetching)
            if not fault:
                return
        raise UserError(f"{remote.url}: {fault}: it changed on the server since "
                        f"{'its index was made' if remote.sha256 else 'the run began'}, or is damaged there")


def transfer(remote: RemoteShard, path: Path, fetching: Fetching) -> str | None:
    """Fetch a shard; what is wrong with its bytes, or None where it is now in place."""
    part = reserved(remote, path, fetching.needed)
    stop = fetching.stop or threading.Event()
    try:
        with room_in_cache(part), open(part, "r+b") as file:
            folder = opened_folder(remote.folder)
            patiently(lambda: folder.download(remote.name, file, stop), warn=fetching.warn, stop=stop)
            size = file.seek(0, os.SEEK_END) if is_s3(remote.folder) else file.tell()
        fault = wrong_bytes(remote, part, size, folder)
        if not fault:
            os.replace(part, path)
            stamp(remote, path)
        return fault
    finally:
        part.unlink(missing_ok=True)


@cache
def opened_folder(url: str):
    """One client for all shards of a set."""
    return remote_folder(url)


def wrong_bytes(remote: RemoteShard, part: Path, size: int, folder) -> str | None:
    """What a fetched file has other than expected, in words."""
    if size != remote.nbytes:
        return f"has {size} bytes, expected {remote.nbytes}"
    if remote.sha256:
        found = file_checksum(part)
        return None if found == remote.sha256 else f"its sha256 is {found}, {remote.sha256} in the index"
    head = patiently(lambda: folder.head(remote.name))
    return None if head and head["ETag"] == remote.version else "is another object"


def is_expected(remote: RemoteShard, path: Path) -> bool:
    """Whether the file that is there is the expected one, by its checksum."""
    if not remote.sha256 or path.stat().st_size != remote.nbytes or file_checksum(path) != remote.sha256:
        return False
    stamp(remote, path)
    return True


def is_verified(remote: RemoteShard, path: Path) -> bool:
    with suppress(OSError):
        return stamp_path(path).read_text(encoding="utf-8") == stamp_of(remote, path)
    return False


def stamp(remote: RemoteShard, path: Path) -> None:
    with replacing(stamp_path(path)) as temporary:
        temporary.write_text(stamp_of(remote, path), encoding="utf-8")


def stamp_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def stamp_of(remote: RemoteShard, path: Path) -> str:
    """Which file was verified, since which start of the machine: what was not on disk then may be lost."""
    status = path.stat()
    return f"{remote.sha256 or remote.version} {status.st_ino} {status.st_size} {status.st_mtime_ns} {boot()}"


@cache
def boot() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def touch(path: Path) -> None:
    """Note the time of use, by which shards are removed that no order of need names."""
    with suppress(OSError):
        os.utime(stamp_path(path))


def last_use(path: Path) -> float:
    with suppress(OSError):
        return stamp_path(path).stat().st_mtime
    return 0.0


def locked(path: Path, mode: int):
    """A block in which this thread holds the lock of a shard; BlockingIOError for LOCK_NB where another does."""
    return flocked(path.with_name(f".{path.name}.lock"), mode)


# --- room ---

def reserved(remote: RemoteShard, path: Path, needed: Sequence[Path]) -> Path:
    """A file of the shard's size, which counts as taken.  NoRoom, or UserError where there can be none."""
    root, part = path.parent.parent, part_path(path)
    with locked(root / "room", fcntl.LOCK_EX):
        part.unlink(missing_ok=True)
        make_room(root, remote, path, needed)
        with room_in_cache(part), open(part, "wb") as file:
            file.truncate(remote.nbytes)
    return part


def make_room(root: Path, remote: RemoteShard, path: Path, needed: Sequence[Path]) -> None:
    """Remove shards until there is room for this one: those that nothing needs, then those that are needed last."""
    present = parts_in(root)  # before the whole ones: a part that becomes one meanwhile is counted
    present |= {found: size_of(found) for found in root.glob("*/*.hdf5")}
    free = shutil.disk_usage(root).free
    most = remote.most_cached or sum(present.values()) + int(MOST_OF_FREE * free)
    if remote.nbytes > most:
        raise UserError(f"{remote.url}: {format_bytes(remote.nbytes)}, but the copies of shards in {root} may take "
                        f"{format_bytes(most)} ({'--shard_cache_gb' if remote.most_cached else 'the disk has no more'})"
                        f": BERT_CACHE_DIR names another folder")
    order = {other: number for number, other in enumerate(needed)}
    own = order.get(path, -1)
    removable = sorted((found for found in present if found != path and found.suffix == ".hdf5"
                        and order.get(found, len(order)) > own),
                       key=lambda found: (-order.get(found, len(order)), last_use(found)))
    excess = sum(present.values()) + remote.nbytes - most
    for found in removable:
        if excess <= 0:
            return
        if remove_unheld(found):
            excess -= present[found]
    if excess > 0:
        raise NoRoom


def part_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def parts_in(root: Path) -> dict[Path, int]:
    """The sizes of the files that are being fetched; those of processes that were killed are removed."""
    sizes = {}
    for part in root.glob("*/.*.part"):
        if not remove_unheld(part.with_name(part.name[1:-len(".part")]), part):
            sizes[part] = size_of(part)
    return sizes


def bytes_here(path: Path) -> int:
    """How much of a shard that is being fetched is on the disk: the file has its whole size from the start."""
    with suppress(FileNotFoundError):
        return part_path(path).stat().st_blocks * 512
    return size_of(path)


def size_of(path: Path) -> int:
    """0 where it has just been removed or renamed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove_unheld(path: Path, file: Path | None = None) -> bool:
    """Remove a shard, or another file of it, unless somebody holds its lock; whether it was removed."""
    try:
        with locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            (file or path).unlink(missing_ok=True)
    except BlockingIOError:
        return False
    return True
