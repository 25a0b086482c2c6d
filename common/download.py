"""Download of remote files: a file appears only when it is complete and verified.  No torch here.

    local_file("s3://bucket/vocab.txt")        a copy in the cache folder, updated when the file changes
    fetch(url, "dump.bz2", sha1=…)             resumes an interrupted download
"""

import hashlib
import json
import os
import random
import time
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tqdm import tqdm

from common.errors import UserError
from common.files import cache_folder, sync_folder, write_json
from common.locks import file_lock
from common.remote_sources import Interrupted, remote_source

TRIES = 8  # attempts in a row without progress, before a download is given up
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0  # seconds between tries; doubled each time
BLOCK = 1 << 20


def is_remote(name) -> bool:
    return str(name).startswith(("http://", "https://", "s3://"))


def local_file(name) -> Path:
    """A local path unchanged; for a URL, the path of a local copy."""
    if not is_remote(name):
        return Path(name)
    place = hashlib.sha256(os.path.dirname(str(name)).encode()).hexdigest()[:16]
    return fetch(str(name), cache_folder() / place / (PurePosixPath(urlsplit(str(name)).path).name or "file"))


def fetch(url: str, target, sha1: str | None = None, sha256: str | None = None,
          tries: int = TRIES, first_wait: float = FIRST_WAIT) -> Path:
    """Download a URL to the file `target`, unless that is up to date.

    The file is verified by a checksum (hex) if one is given, else by the size that the server reports.  An interrupted
    download continues where it stopped, also in a later call, if the server still has the same version of the file.
    UserError, and `target` stays as it was, when `tries` attempts in a row make no progress or the file is not the
    expected one.
    """
    transfer = Transfer(url, Path(target), {"sha1": sha1, "sha256": sha256})
    with file_lock(transfer.target, f"{transfer.target} (from {url})", patient=True):
        if not transfer.finished():
            transfer.receive_with_retries(tries, first_wait)
            transfer.accept()
    return transfer.target


class Transfer:
    """The download of one file: its source, and the part received so far (.NAME.part).

    .NAME.part.json holds URL, version and size of the file on the server, and becomes .NAME.json in the end.
    """

    def __init__(self, url: str, target: Path, checksums: dict):
        self.url, self.target, self.source = url, target, remote_source(url)
        self.checksums = {name: value.lower() for name, value in checksums.items() if value}
        self.partial = target.with_name(f".{target.name}.part")
        self.partial_state_file = target.with_name(f".{target.name}.part.json")
        self.state_file = target.with_name(f".{target.name}.json")

    def finished(self) -> bool:
        """Whether the target has the checksum; without one, whether it is the version that the server has."""
        if not self.target.is_file():
            return False
        if self.checksums:
            return mismatch(self.target, self.checksums) is None
        try:
            reply = self.source.open(0)
        except Interrupted as error:
            print(f"{self.url}: {error}; using the copy in {self.target}")
            return True
        reply.blocks.close()
        return reply.version is not None and read_state(self.state_file) == self.state_of(reply)

    def state_of(self, reply) -> dict:
        return {"url": self.url, "version": reply.version, "size": reply.size}

    def received_bytes(self) -> int:
        """The size of the partial file, or 0 if it cannot be continued."""
        state = read_state(self.partial_state_file)
        if state.get("url") != self.url or not (state.get("version") or self.checksums) or not self.partial.is_file():
            return 0
        return self.partial.stat().st_size

    def receive_with_retries(self, tries: int, first_wait: float) -> None:
        failures, furthest = 0, self.received_bytes()
        while True:
            try:
                return self.receive()
            except Interrupted as error:
                failures = 0 if self.received_bytes() > furthest else failures + 1
                furthest = max(furthest, self.received_bytes())
                if failures >= tries:
                    raise UserError(f"{self.url}: given up: {error} (attempts without progress: {tries})") from None
                pause = min(LONGEST_WAIT, first_wait * 2**failures) * random.uniform(0.75, 1.25)
                time.sleep(max(pause, min(error.wait or 0, LONGEST_WAIT)))

    def receive(self) -> None:
        """One attempt: append what is missing to the partial file."""
        offset, state = self.received_bytes(), read_state(self.partial_state_file)
        if offset and offset == state.get("size"):
            return
        reply = self.source.open(offset, state.get("version"))
        if reply.start not in (0, offset) or (reply.start and self.state_of(reply) != state):
            self.partial.unlink(missing_ok=True)
            raise Interrupted("the file changed on the server")
        if reply.size is None and not reply.framed and not self.checksums:
            raise UserError(f"{self.url}: the server does not state the size, and no checksum is known: "
                            f"an incomplete download could not be recognised")
        write_json(self.partial_state_file, self.state_of(reply))
        self.append(reply)

    def append(self, reply) -> None:
        """Write the bytes of a reply, and check that as many arrived as it announced."""
        with (open(self.partial, "ab" if reply.start else "wb") as file,
              tqdm(total=reply.size, initial=reply.start, unit="B", unit_scale=True, desc=self.target.name) as bar):
            try:
                for block in reply.blocks:
                    file.write(block)
                    bar.update(len(block))
            except Interrupted as error:
                if error.damaged:
                    file.truncate(0)
                raise
        size = self.partial.stat().st_size
        if reply.size is not None and size != reply.size:
            if size > reply.size:
                self.partial.unlink()
            raise Interrupted(f"{size} bytes received, {reply.size} announced")

    def accept(self) -> None:
        """Verify the partial file, then rename it to the target; if it is wrong, delete it."""
        fault = mismatch(self.partial, self.checksums)
        if fault:
            self.partial.unlink()
            raise UserError(f"{self.url}: {fault}; the file was deleted; try again, or use another mirror")
        with open(self.partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.target)
        os.replace(self.partial_state_file, self.state_file)
        sync_folder(self.target.parent)


def read_state(path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def file_checksum(path, name: str = "sha256") -> str:
    """The hex digest of a file."""
    digest = hashlib.new(name)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def mismatch(path: Path, checksums: dict[str, str]) -> str | None:
    """The first of the expected checksums (hex, by algorithm) that a file does not have, as text, or None."""
    for name, expected in checksums.items():
        found = file_checksum(path, name)
        if found != expected:
            return f"{name} is {found}, expected {expected}"
    return None
