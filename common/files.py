"""Atomic writes: a file appears complete or not at all; and the cache folder.  No torch here."""

import fcntl
import io
import json
import os
import secrets
import stat
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import NO_SPACE, UserError


@contextmanager
def replacing(path):
    """Yield a temporary path; at the end of the block its file is flushed to disk and renamed to `path`.

    If the block raises, the temporary file is removed and `path` stays as it was.

        with replacing("metadata.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    with replacing_files(path.parent, [path.name]) as (temporary,):
        yield temporary


class PatientFile(io.FileIO):
    """A file whose write errors are deferred: the first is kept in `failure`, and later writes are discarded."""

    failure: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data).cast("B")
        try:
            while view and not self.failure:
                view = view[super().write(view):]
        except OSError as error:
            self.failure = error
        return len(data)


@contextmanager
def replacing_files(folder, names):
    """The same for several files.

    A crash between the renames leaves new files beside old ones: write a record after this block if that matters.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = [folder / f".{name}.{secrets.token_hex(4)}.tmp" for name in names]
    try:
        for temporary in temporaries:
            temporary.write_bytes(b"")
        yield temporaries
        for temporary in temporaries:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        for temporary, name in zip(temporaries, names, strict=True):
            os.replace(temporary, folder / name)
        sync_folder(folder)
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


@contextmanager
def flocked(path, mode: int):
    """A block in which this thread holds the kernel's lock of a file, which is made; not where there are no locks.

    BlockingIOError for LOCK_NB where another holds it.
    """
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, mode)
        except BlockingIOError:
            raise
        except OSError:  # the file system has none
            pass
        yield


@contextmanager
def room_in_cache(path):
    """A block that writes this file of the cache folder; UserError that names it where its disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise UserError(f"{path}: {error.strerror}: --shard_cache_gb bounds what shards take here, BERT_CACHE_DIR "
                        "names another folder") from None


def remove_leftovers(folder, name: str = "**/.*") -> None:
    """Delete the temporary files that a killed run left in a folder, for files with this name (a pattern).

    The caller holds a lock, so that no other run is writing them.
    """
    for path in Path(folder).glob(f"{name}.tmp"):
        with suppress(FileNotFoundError):
            if path.is_file():
                path.unlink()


def sync_folder(folder) -> None:
    """Flush a folder, so that renames in it survive a power cut (POSIX)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def nearest_existing(path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    path = Path(path).absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def cache_folder() -> Path:
    """Where compiled kernels and local copies of remote files are kept.

    A user without a home, such as a user id without a name in a container, gets a folder in the temporary one.
    """
    if os.environ.get("BERT_CACHE_DIR"):
        return folder_in_variable("BERT_CACHE_DIR")
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_pretraining"
    except RuntimeError:  # there is no home
        return own_folder(Path(tempfile.gettempdir()) / f"bert_pretraining_{os.getuid()}")


def folder_in_variable(name: str) -> Path:
    """The folder that an environment variable names.  UserError where that is a URL."""
    if "://" in os.environ[name]:
        raise UserError(f"{name}={os.environ[name]}: this must be a folder of this machine, and no URL")
    return Path(os.environ[name])


def own_folder(path: Path) -> Path:
    """Make a folder that nobody else can write to, unless it is there.  UserError where it is another user's."""
    path.mkdir(mode=0o700, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{path}: others can write to it; name another folder in BERT_CACHE_DIR")
    return path
