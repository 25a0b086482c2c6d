"""A log file in object storage: written on this machine, and copied there while it grows.  No torch here."""

import hashlib
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

from common.errors import UserError
from common.files import cache_folder
from common.object_store import Cancelled, S3Folder, is_s3, patiently

COPY_SECONDS = 30.0  # between two copies
FIRST_PATIENCE = LAST_PATIENCE = 60.0  # seconds that a server may be away at the start and at the end


@contextmanager
def mirrored_log(name: str | None, append: bool, warn):
    """Yield the path to write to: that of a local file itself; of an s3:// URL that of a local copy.

    With `append` the copy begins with what is there.  What cannot be copied in the end is told to `warn`.
    """
    if not name or not is_s3(name):
        yield name
        return
    mirror = Mirror(name, append)
    thread = threading.Thread(target=mirror.run, name=f"copies {name}", daemon=True)
    thread.start()
    try:
        yield str(mirror.path)
    finally:
        mirror.stop.set()
        thread.join()
        try:
            patiently(mirror.copy, patience=LAST_PATIENCE)
        except UserError as error:
            warn(f"{name}: its last lines are in {mirror.path} only: {error}")


class Mirror:
    def __init__(self, url: str, append: bool):
        parent, _, self.name = url.rpartition("/")
        self.folder, self.copied, self.stop = S3Folder(parent), -1, threading.Event()
        place = hashlib.sha256(url.encode()).hexdigest()[:16]
        self.path = Path(cache_folder()) / "outputs" / f"{self.name}-{place}" / self.name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = patiently(lambda: self.folder.read(self.name), patience=FIRST_PATIENCE) if append else None
        self.path.write_bytes(content or b"")

    def run(self) -> None:
        """The thread."""
        while not self.stop.wait(COPY_SECONDS):
            with suppress(UserError, Cancelled):  # the end of the run tries again, and tells of it
                patiently(self.copy, patience=float("inf"), stop=self.stop)

    def copy(self) -> None:
        content = self.path.read_bytes()
        if len(content) != self.copied:
            self.folder.put(self.name, content)
            self.copied = len(content)
