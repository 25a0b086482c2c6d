"""Who holds a lock, and whether that process is alive, as far as it shows here (locks.py).  No torch here."""

import json
import os
import secrets
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

STALE_SECONDS = 120.0  # without a renewal: twice as long as clients of NFS may keep a file's times in their caches
ENDING = "ending"  # the second line of a lock whose owner was told to end


@dataclass(frozen=True)
class LockOwner:
    """A process, as its lock file names it."""

    command: str
    pid: int
    host: str
    started: str
    namespace: str | None  # in which the number counts; None where that cannot be told
    ticks: int  # when the process began, since its host did
    token: str  # of this lock alone

    def __str__(self) -> str:
        return f"{self.command}, process {self.pid} on host {self.host}, started {self.started}"

    def is_dead(self) -> bool | None:
        """Whether the process is gone; None where that cannot be seen from here."""
        if self.namespace is None or self.namespace != process_namespace():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # it is another user's
            pass
        began, threads = process_facts(self.pid)
        return None if began is None else began != self.ticks or threads == 0


def this_process() -> LockOwner:
    return LockOwner(command=Path(sys.argv[0]).name or "python", pid=os.getpid(), host=socket.gethostname(),
                     started=datetime.now().astimezone().isoformat(" ", "seconds"), namespace=process_namespace(),
                     ticks=process_facts("self")[0] or 0, token=secrets.token_hex(8))


def process_namespace() -> str | None:
    """Names where this process's number counts: the boot of the host, and the namespace.  None where it does not show,
    and where /proc numbers processes otherwise.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        visible = os.readlink("/proc/self") == str(os.getpid())
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}" if visible else None
    except OSError:
        return None


def process_facts(pid) -> tuple[int | None, int]:
    """When a process began, since its host did, and how many threads of it live; None where that is not shown."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None, 0
    ended = fields[0] in (b"Z", b"X")  # its first thread, of which nobody has asked yet how it ended
    return int(fields[19]), int(fields[17]) - ended


@dataclass(frozen=True)
class Sighting:
    """A lock file as it was seen at one moment."""

    text: str  # "" where it may not be read
    changed: int  # its time of modification, ns

    @property
    def owner(self) -> LockOwner | None:
        """None where the file may not be read, or is not complete yet."""
        try:
            owner = LockOwner(**json.loads(self.text.partition("\n")[0]))
        except (ValueError, TypeError):
            return None
        return owner if isinstance(owner.pid, int) and isinstance(owner.ticks, int) else None

    @property
    def ending(self) -> bool:
        return ENDING in self.text.splitlines()[1:]


def sighting(path: Path) -> Sighting | None:
    """The lock file as it is now, None where there is none.  Opening it makes NFS ask the server."""
    with suppress(OSError):  # removed, perhaps while it was read (ESTALE)
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                return Sighting(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except PermissionError:
            return Sighting("", path.stat().st_mtime_ns)
    return None


class LockWatch:
    """What a process that waits for a lock has seen of it."""

    def __init__(self):
        self.seen: Sighting | None = None
        self.looked = self.began = time.monotonic()  # last at the lock; first at that of this owner
        self.still = 0.0  # seconds of looking since the last renewal
        self.renewals = 0

    def look(self, seen: Sighting) -> None:
        """A second at most counts between two looks: while the file system hangs, nobody can renew a lock."""
        now = time.monotonic()
        self.still += min(1.0, now - self.looked)
        self.looked = now
        if self.seen is None or seen.owner != self.seen.owner:
            self.began, self.still, self.renewals = now, 0.0, 0
        elif seen.changed != self.seen.changed:
            self.still = 0.0
            self.renewals += 1
        self.seen = seen

    @property
    def waited(self) -> float:
        return self.looked - self.began

    def is_dead(self) -> bool | None:
        """Whether the owner is dead; None while that cannot be told."""
        dead = self.seen.owner.is_dead() if self.seen.owner else None
        if dead is not None:
            return dead
        return True if self.still > STALE_SECONDS else False if self.renewals else None
