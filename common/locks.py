"""One writer at a time: a lock is a file that its owner makes, keeps alive, and removes.  No torch here.

    with folder_lock("results", "--output_dir results"):   # results/.in_use
    with file_lock("books.hdf5", "books.hdf5"):            # .books.hdf5.in_use beside the file

Only the creation of a file has to be atomic, which shared file systems offer without a lock daemon, too.  The lock
names its owner.  It does not hold where the owner is dead, which is told

- by the owner's process, from within its process namespace: no other process ever has both its number and its start;
- from elsewhere (another host, another container of the same host) by the lock's time of modification, which a thread
  of the owner renews.  Only its changes count, as seen here: the clocks of hosts and servers differ.
"""

import json
import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from common.errors import UserError
from common.lock_owner import ENDING, STALE_SECONDS, LockWatch, Sighting, sighting, this_process

FIRST_RENEWAL, RENEWAL_SECONDS = 0.5, 5.0  # between two renewals: often at first, because double starts come together
ENDING_SECONDS = 600.0  # a run that was told to end may take that long, for its last checkpoint
LONGEST_WAIT = STALE_SECONDS + ENDING_SECONDS  # of a process that is not patient
POLL_SECONDS = 0.2
REMOVAL_SECONDS = 10.0  # a removal takes a moment; one that takes longer was killed
LOCK_NAME = ".in_use"
HELD: list["LockFile"] = []  # by this process

os.register_at_fork(after_in_child=HELD.clear)  # a child is not the owner


@contextmanager
def folder_lock(folder, what: str):
    """A block in which no other run writes to the folder.  UserError, naming `what`, where one does."""
    with held(LockFile(Path(folder) / LOCK_NAME, what)):
        yield


@contextmanager
def file_lock(path, what: str, patient: bool = False):
    """A block in which no other process writes the file; a `patient` one waits as long as one does."""
    with held(LockFile(Path(path).with_name(f".{Path(path).name}{LOCK_NAME}"), what), patient):
        yield


class FileLocks(ExitStack):
    """Locks of several files, taken and dropped one by one; those that are left are dropped with the block."""

    def __init__(self):
        super().__init__()
        self.stacks: dict[Path, ExitStack] = {}

    def take(self, path: Path) -> Path:
        """Lock a file; returns its path.  UserError where another process writes it."""
        self.stacks[path] = self.enter_context(ExitStack())
        self.stacks[path].enter_context(file_lock(path, str(path)))
        return path

    def drop(self, path: Path) -> None:
        self.stacks.pop(path).close()


@contextmanager
def held(lock: "LockFile", patient: bool = False):
    """A block in which this process holds the lock.  SIGTERM ends the block like Ctrl-C."""
    with terminable():
        try:
            lock.acquire(patient)
            yield
        finally:
            lock.release()


@contextmanager
def terminable():
    """A block in which SIGTERM raises KeyboardInterrupt, unless the caller handles it, or this is no main thread."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def announce_end() -> None:
    """Say in the locks of this process that it was told to end: who comes next waits for it."""
    for lock in list(HELD):
        with suppress(OSError):
            lock.announce_end()


def release_all() -> None:
    """Remove the locks of this process, which is about to end without leaving its blocks."""
    for lock in list(HELD):
        lock.release()


class LockFile:
    """The lock with this path, of which a UserError says that it holds `what`."""

    def __init__(self, path: Path, what: str):
        self.path, self.what = path, what
        self.text, self.token = "", ""
        self.made_folders: list[Path] = []
        self.ended = threading.Event()

    def acquire(self, patient: bool) -> None:
        """Make the file.  Waits for what may be a dead owner or ends soon, says so, and removes a dead one's lock."""
        watch, announced, attempts = LockWatch(), None, 0
        while not self.create():
            seen = self.sighting()
            if seen is None:
                attempts += 1
                if attempts > REMOVAL_SECONDS / POLL_SECONDS:
                    raise UserError(f"{self.what}: {self.path} can be neither made nor read: delete it")
            else:
                watch.look(seen)
                dead = watch.is_dead()
                if dead:
                    self.remove_dead(seen)
                    continue
                announced = self.wait_or_refuse(watch, dead, patient, announced)
            time.sleep(POLL_SECONDS)
        HELD.append(self)
        threading.Thread(target=self.renew, name=f"renews {self.path}", daemon=True).start()

    def sighting(self) -> Sighting | None:
        """The lock as it is now, None where there is none."""
        return sighting(self.path)

    def announce_end(self) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{ENDING}\n")

    def wait_or_refuse(self, watch: LockWatch, dead: bool | None, patient: bool, announced: str | None) -> str | None:
        """Return, to look again; prints why, unless that was `announced`.  UserError where there is no use in it."""
        owner = watch.seen.owner or "a process of another user"
        if dead is None:
            why = (f"unless it gives a sign of life, this run starts after {STALE_SECONDS:.0f} seconds, or when "
                   f"{self.path} is deleted")
        elif watch.seen.ending and watch.waited < ENDING_SECONDS:
            why = f"it was told to end: waiting up to {ENDING_SECONDS:.0f} seconds"
        elif patient:
            why = "waiting for its end"
        else:
            raise UserError(f"{self.what}: in use by {owner}; wait for its end, or choose another (its lock is "
                            f"{self.path})")
        if why != announced and watch.waited > 2 * POLL_SECONDS:
            print(f"{self.what}: in use by {owner}; {why}", file=sys.stderr, flush=True)
            return why
        return announced

    def create(self) -> bool:
        """Make the file, unless there is one.  UserError where the folder cannot be written to."""
        owner, descriptor = this_process(), None
        try:
            self.make_folder()
            descriptor = self.open_new()
            if descriptor is None:
                return False
            self.text, self.token = json.dumps(asdict(owner)) + "\n", owner.token
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(self.text)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{self.what}: cannot be written: {self.path.parent} is not a folder") from None
        except OSError as error:
            if descriptor is not None:
                self.path.unlink(missing_ok=True)
            raise UserError(f"{self.what}: cannot be written: {error.strerror}") from None
        return True

    def open_new(self) -> int | None:
        """The descriptor of the new file; None where there is one, or its folder has just been removed."""
        try:
            return os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except (FileExistsError, FileNotFoundError):
            return None

    def make_folder(self) -> None:
        folder = self.path.parent
        missing = [place for place in (folder, *folder.parents) if not place.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self.made_folders = missing or self.made_folders

    def remove_made_folders(self) -> None:
        for folder in self.made_folders:  # the innermost first
            with suppress(OSError):
                folder.rmdir()

    def renew(self) -> None:
        """The thread of the owner."""
        pause = FIRST_RENEWAL
        while not self.ended.wait(pause):
            pause = min(1.1 * pause, RENEWAL_SECONDS)
            with suppress(OSError):
                seen = sighting(self.path)
                if seen is None and not self.ended.is_set():
                    self.restore()
                elif seen and seen.owner and seen.owner.token != self.token and not self.ended.is_set():
                    print(f"{self.what}: taken over by {seen.owner}, because this process gave no sign of life for "
                          f"{STALE_SECONDS:.0f} seconds; it ends here", file=sys.stderr, flush=True)
                    os._exit(2)
                else:
                    self.touch()

    def touch(self) -> None:
        try:
            os.utime(self.path)
        except PermissionError:  # on some network file systems
            with open(self.path, "r+", encoding="utf-8") as file:
                file.write(self.text)

    def restore(self) -> None:
        """Make the file again, which somebody has deleted."""
        with open(self.path, "x", encoding="utf-8") as file:
            file.write(self.text)

    def release(self) -> None:
        """Remove the file, and the folders that were made for it, where they are empty.  Nothing in another process."""
        if self not in HELD:
            self.remove_made_folders()
            return
        self.ended.set()
        with suppress(ValueError):  # release_all, in another thread, has removed it in this moment
            HELD.remove(self)
        give_up = time.monotonic() + REMOVAL_SECONDS
        while (seen := sighting(self.path)) and seen.owner and seen.owner.token == self.token:
            with suppress(OSError):
                self.remove(seen)
            if time.monotonic() > give_up:
                break
        self.remove_made_folders()

    def remove_dead(self, seen: Sighting) -> None:
        try:
            self.remove(seen)
        except OSError as error:
            raise UserError(f"{self.what}: the lock {self.path} of a process that has ended cannot be removed: "
                            f"{error.strerror}") from None

    def remove(self, seen: Sighting) -> None:
        """Remove the lock, unless it has changed since it was seen: one process at a time looks and removes."""
        guard = self.path.with_name(f"{self.path.name}.removal")
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            self.await_removal(guard)
            return
        try:
            if sighting(self.path) == seen:
                self.path.unlink(missing_ok=True)
        finally:
            guard.unlink(missing_ok=True)

    def await_removal(self, guard: Path) -> None:
        """Wait while another process removes the lock; where that one was killed, remove its guard."""
        give_up = time.monotonic() + REMOVAL_SECONDS
        while guard.exists():
            if time.monotonic() > give_up:
                guard.unlink(missing_ok=True)
            time.sleep(POLL_SECONDS / 10)
