"""One writer at a time below a prefix in object storage: a lock is an object, as locks.py has files.  No torch here.

Its creation and its take-over are conditional writes (If-None-Match, If-Match), of which one succeeds.  Where a server
does not know them, the last of two that start in the same second has the lock, and the other one ends.
"""

import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict

from common.errors import UserError
from common.lock_owner import ENDING, STALE_SECONDS, Sighting, this_process
from common.locks import HELD, LOCK_NAME, LockFile, held
from common.object_store import S3Folder, patiently
from common.remote_sources import Interrupted

RENEWAL_SECONDS = 10.0
SETTLE_SECONDS = 1.0  # before a server without conditional writes is asked whose lock it has
FIRST_PATIENCE = 60.0  # seconds that a server may be away when a run starts


@contextmanager
def prefix_lock(url: str, what: str):
    """A block in which no other run writes below the prefix.  UserError, naming `what`, where one does."""
    with held(ObjectLock(url, LOCK_NAME, what)):
        yield


@contextmanager
def object_lock(url: str, what: str):
    """A block in which no other run writes the object."""
    parent, _, name = url.rpartition("/")
    with held(ObjectLock(parent, f".{name}{LOCK_NAME}", what)):
        yield


class ObjectLock(LockFile):
    """The lock that is the object `name` of an s3:// folder."""

    def __init__(self, url: str, name: str, what: str):
        super().__init__(f"{url.rstrip('/')}/{name}", what)
        self.folder, self.name = S3Folder(url), name
        self.etag = ""
        self.dead = ""  # the ETag of the lock that is taken over
        self.renewals = 0
        self.conditional = True

    def create(self) -> bool:
        owner = this_process()
        self.text, self.token = json.dumps(asdict(owner)) + "\n", owner.token
        dead, self.dead = self.dead, ""
        return self.write(IfMatch=dead) if dead else self.write(IfNoneMatch="*")

    def write(self, **conditions) -> bool:
        """Write the object under a condition; whether it held, as far as the server knows of such."""
        self.renewals += 1
        content = f"{self.text}renewal {self.renewals}\n".encode()
        try:
            etag = self.attempt(lambda: self.folder.put(self.name, content, **conditions))
        except UserError as error:
            if "NotImplemented" not in str(error):
                raise UserError(f"{self.what}: cannot be written: {error}") from None
            etag = self.unconditional(content, conditions)
        self.etag = etag or self.etag
        return etag is not None

    def attempt(self, action):
        return patiently(action, patience=0.0 if self in HELD else FIRST_PATIENCE)

    def unconditional(self, content: bytes, conditions: dict) -> str | None:
        """The same on a server without conditional writes."""
        found = self.attempt(self.found)
        if ("IfNoneMatch" in conditions and found) or (found and conditions.get("IfMatch") not in (None, found[1])):
            return None
        etag = self.attempt(lambda: self.folder.put(self.name, content))
        time.sleep(SETTLE_SECONDS)
        found = self.attempt(self.found)
        return etag if found and found[0] == content.decode() else None

    def found(self) -> tuple[str, str] | None:
        """Text and ETag of the object; None where there is none."""
        head = self.folder.head(self.name)
        content = self.folder.read(self.name) if head else None
        return (content.decode(errors="replace"), head["ETag"]) if content is not None else None

    def sighting(self) -> Sighting | None:
        found = self.attempt(self.found)
        if found is None:
            return None
        self.etag = found[1]
        return Sighting(found[0], hash(found[1]))

    def remove_dead(self, seen: Sighting) -> None:
        """Let create() replace the lock of a process that has ended, unless another one does that first."""
        found = self.attempt(self.found)
        self.dead = found[1] if found and hash(found[1]) == seen.changed else ""

    def announce_end(self) -> None:
        self.text += f"{ENDING}\n"
        with suppress(UserError, Interrupted):
            self.write(IfMatch=self.etag)

    def renew(self) -> None:
        while not self.ended.wait(RENEWAL_SECONDS):
            with suppress(UserError, Interrupted):  # the server is away: nobody else can see the lock either
                if self.write(IfMatch=self.etag):
                    continue
                found = self.attempt(self.found)
                if found is None:
                    self.write(IfNoneMatch="*")  # somebody has deleted it
                elif (owner := Sighting(*found[:1], 0).owner) and owner.token != self.token and not self.ended.is_set():
                    print(f"{self.what}: taken over by {owner}, because this process gave no sign of life for "
                          f"{STALE_SECONDS:.0f} seconds; it ends here", file=sys.stderr, flush=True)
                    os._exit(2)
                else:
                    self.etag = found[1]

    def release(self) -> None:
        if self not in HELD:
            return
        self.ended.set()
        with suppress(UserError, Interrupted):
            found = self.attempt(self.found)
            if found and (owner := Sighting(found[0], 0).owner) and owner.token == self.token:
                self.folder.delete([self.name])
        with suppress(ValueError):
            HELD.remove(self)
