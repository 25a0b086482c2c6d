"""Files: written whole or not at all."""

import json
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
