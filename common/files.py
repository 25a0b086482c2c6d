"""Files written whole or not at all, and where this repository keeps what it can make or fetch again."""

import io
import json
import math
import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; when the block ends well, its file is flushed to disk and takes the name.

    When the block raises, the temporary file is removed and whatever stood under `path` is as it was.

        with replacing("metadata.json") as temporary:
            temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


class PatientFile(io.FileIO):
    """A file that keeps the first failure of a write to itself, and lets what comes after it go nowhere."""

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
    """Yield temporary paths for files that belong together; when the block ends well, all of them take their names.

    When the block raises, they are removed.  A crash between the renames leaves some new files beside some old ones: a
    caller that must know writes a record after this block.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
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


def remove_leftovers(*folders, before: float = math.inf) -> None:
    """Delete the temporary files that a killed run left in these folders and the folders in them.

    Where another run may still be writing there, `before` is the time at which this one started: what was written to
    since then stays.
    """
    for folder in folders:
        for path in Path(folder).rglob(".*.tmp"):
            with suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < before:
                    path.unlink()


def sync_folder(folder) -> None:
    """Make the renames in `folder` survive a power cut (POSIX: the folder itself is flushed)."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def cache_folder() -> Path:
    """Where compiled kernels and local copies of remote files are kept: what can be made or downloaded again."""
    if os.environ.get("BERT_CACHE_DIR"):
        return Path(os.environ["BERT_CACHE_DIR"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_pretraining"
