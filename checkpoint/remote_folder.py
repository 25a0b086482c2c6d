"""Checkpoints in object storage: written to a scratch folder of this server, uploaded in the background.

A checkpoint is there when its ckpt_<step>.pt is: that object appears whole, and last.  Sharded optimizer state is
uploaded by the rank that holds it, from its own server's disk; rank 0 uploads ckpt_<step>.pt when it sees all of it.
Copies of what was read or uploaded stay in the scratch folder, each with the ETag of its object in .NAME.etag; a run
believes nothing else there.  A server that is away delays uploads and ends no training.
"""

import fcntl
import hashlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.file import seal_of
from checkpoint.rotation import KEPT, STEP_NAME, superseded
from common.errors import UserError
from common.files import cache_folder, flocked, remove_leftovers, replacing, room_in_cache
from common.object_store import Cancelled, S3Folder, etag_path, is_copy, mark_as_copy, patiently
from common.remote_sources import Interrupted

INDEX = "index.json"  # of sharded optimizer state
SEAL = "seal"  # in the metadata of an uploaded file of a checkpoint
FIRST_PATIENCE = 60.0  # seconds that a server may be away when a run starts
LAST_PATIENCE = 900.0  # seconds that the end of a run waits for its last upload
POLL_SECONDS = 1.0  # between two looks for the shares of other ranks
SET_ASIDE = ".set_aside"
FETCHING = ".fetching"  # the lock of the scratch folder


@dataclass
class Job:
    """What one rank uploads of a checkpoint: files by the names of their objects, in this order."""

    step: int
    files: dict[str, Path]
    seals: dict[str, str] = field(default_factory=dict)  # of the shares of all ranks, which come before the last file
    protected: Collection[int] = ()
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def completes(self) -> bool:
        return f"ckpt_{self.step}.pt" in self.files


class RemoteFolder:
    """An s3:// prefix as a folder of checkpoints; as a path it is the scratch folder of this server."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self.store = S3Folder(self.url)
        place = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.scratch = cache_folder() / "outputs" / f"{self.url.rpartition('/')[2]}-{place}"
        self.jobs: deque[Job] = deque()
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()
        self.saved: list[str] = []  # to be reported
        self.last_saved: int | None = None
        self.warnings: list[str] = []
        self.last_error = "the server did not answer"

    def __fspath__(self) -> str:
        return str(self.scratch)

    def __str__(self) -> str:
        return self.url

    # --- reading ---

    def names(self, below: str = "ckpt_") -> dict[str, tuple[int, str]]:
        return patiently(lambda: self.store.names(below), patience=FIRST_PATIENCE)

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, ascending."""
        return steps_in(self.names())

    def fetch(self, step: int) -> None:
        """Copy a checkpoint, with its optimizer state, to the scratch folder, unless it is there."""
        for name, (_, etag) in sorted(self.names(f"ckpt_{step}.").items()):
            if name == f"ckpt_{step}.pt" or name.startswith(f"ckpt_{step}.optim/"):
                self.fetch_file(name, etag)

    def fetch_file(self, name: str, etag: str) -> None:
        path = self.scratch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with flocked(self.scratch / FETCHING, fcntl.LOCK_EX):  # one rank of a server does it for all
            if is_copy(path, etag):
                return
            with room_in_cache(path), replacing(path) as temporary, open(temporary, "r+b") as file:
                stop = threading.Event()
                patiently(lambda: self.store.download(name, file, stop), patience=FIRST_PATIENCE)
            mark_as_copy(path, etag)

    def prepare(self) -> None:
        """End the uploads of killed runs, and remove their files here.  The caller holds the lock of the prefix."""
        patiently(self.store.end_abandoned_uploads, patience=FIRST_PATIENCE)
        present = self.names()
        self.scratch.mkdir(parents=True, exist_ok=True)
        with flocked(self.scratch / FETCHING, fcntl.LOCK_EX):
            remove_leftovers(self.scratch, ".ckpt_*")
            for folder in self.scratch.glob(".ckpt_*.optim.tmp"):
                shutil.rmtree(folder)
            for path in [*self.scratch.glob("ckpt_*.pt"), *self.scratch.glob("ckpt_*.optim/*.*")]:
                name = path.relative_to(self.scratch).as_posix()
                if name not in present or not is_copy(path, present[name][1]):
                    path.unlink()

    # --- writing ---

    def withdraw(self, step: int) -> None:
        """Make a checkpoint incomplete whose optimizer state will be written anew.  OSError where that cannot be."""
        try:
            name = f"ckpt_{step}.pt"
            if name in self.store.names(name):
                self.store.delete([name])
        except (Interrupted, UserError) as error:
            raise OSError(str(error)) from None

    def publish(self, step: int, protected: Collection[int], seals: dict[str, str] | None = None) -> None:
        """Upload ckpt_<step>.pt in the background, after what this rank holds of its optimizer state."""
        name = f"ckpt_{step}.pt"
        files = self.state_files(step, INDEX) | self.state_files(step, "rank_0_of_*.pt") | {name: self.scratch / name}
        self.submit(Job(step, files, seals or {}, protected))

    def publish_share(self, step: int, rank: int) -> None:
        """Upload the optimizer state that a rank has written here, if any."""
        files = self.state_files(step, f"rank_{rank}_of_*.pt")
        if files:
            self.submit(Job(step, files))

    def state_files(self, step: int, pattern: str = "*") -> dict[str, Path]:
        """The files of a checkpoint's optimizer state that lie on this server, by the names of their objects."""
        folders = (self.scratch / f"ckpt_{step}.optim", self.scratch / f".ckpt_{step}.optim.tmp")
        return {f"ckpt_{step}.optim/{path.name}": path for folder in folders for path in sorted(folder.glob(pattern))
                if not path.name.startswith(".")}

    def submit(self, job: Job) -> None:
        """Queue an upload; while the server is away, only the newest few are kept."""
        with self.changed:
            self.jobs.append(job)
            for old in list(self.jobs)[:-KEPT]:
                old.stop.set()
            self.changed.notify_all()
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="checkpoint-uploader", daemon=True)
            self.thread.start()

    def run(self) -> None:
        """The thread: one job after the other."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.jobs or self.ended.is_set())
                if not self.jobs:
                    return
                job = self.jobs[0]
            try:
                self.upload(job)
            except Cancelled:
                if self.ended.is_set():
                    return
                self.warnings.append(f"{self.url}/ckpt_{job.step}.pt was not uploaded: newer ones took its place")
                self.forget(job)
            except (UserError, OSError) as error:
                self.last_error = str(error)
                self.warnings.append(f"{self.url}/ckpt_{job.step}.pt could not be uploaded ({error}), and the training "
                                     "continues")
            with self.changed:
                self.jobs.remove(job)
                self.changed.notify_all()

    def upload(self, job: Job) -> None:
        last = f"ckpt_{job.step}.pt"
        for name, path in job.files.items():
            if name != last:
                self.upload_file(job, name, path)
        if not job.completes:
            return
        self.wait_for_shares(job)
        self.upload_file(job, last, job.files[last])
        self.saved.append(f"{self.url}/{last}")
        self.last_saved = job.step
        self.attempt(job, lambda: self.rotate(job))

    def attempt(self, job: Job, action):
        """The result of an action, however long the server is away, unless the job is given up."""
        return patiently(action, patience=float("inf"), warn=self.note, stop=job.stop)

    def note(self, problem: str) -> None:
        self.last_error = problem
        self.warnings.append(problem)

    def upload_file(self, job: Job, name: str, path: Path) -> None:
        seal = {SEAL: seal_of(path)}
        self.attempt(job, lambda: self.store.upload(path, name, seal, job.stop))
        head = self.attempt(job, lambda: self.store.head(name))
        if head and path.exists():
            mark_as_copy(path, head["ETag"])

    def wait_for_shares(self, job: Job) -> None:
        """Until the optimizer state of all ranks is there, as this checkpoint has it."""
        missing = dict(job.seals)
        while missing:
            for name, seal in list(missing.items()):
                head = self.attempt(job, lambda name=name: self.store.head(f"ckpt_{job.step}.optim/{name}"))
                if head and head["Metadata"].get(SEAL) == seal:
                    del missing[name]
            if missing and job.stop.wait(POLL_SECONDS):
                raise Cancelled

    def rotate(self, job: Job) -> None:
        """Set aside or remove the checkpoints that this one supersedes, there and here."""
        names = self.store.names("ckpt_")
        newer, older = superseded(steps_in(names), job.step, job.protected)
        for step in newer:
            for name in files_of(names, step):
                self.store.copy(name, name.replace(f"ckpt_{step}.pt", f"ckpt_{step}.pt{SET_ASIDE}").replace(
                    f"ckpt_{step}.optim/", f"ckpt_{step}.optim{SET_ASIDE}/"))
        for step in [*newer, *older]:
            self.store.delete(files_of(names, step))
        for path in self.scratch.glob("ckpt_*.pt"):
            found = STEP_NAME.fullmatch(path.name)
            if found and int(found.group(1)) < job.step:
                self.forget(Job(int(found.group(1)), {path.name: path}))

    def forget(self, job: Job) -> None:
        """Remove the local files of a checkpoint."""
        for name, path in (job.files | self.state_files(job.step)).items():
            path.unlink(missing_ok=True)
            etag_path(path).unlink(missing_ok=True)
            with suppress(OSError):
                if "/" in name:
                    path.parent.rmdir()

    # --- reporting ---

    def report(self, say, warn) -> None:
        """Say what was uploaded, and what stands in its way."""
        while self.saved:
            say(f"saved {self.saved.pop(0)}")
        while self.warnings:
            warn(self.warnings.pop(0))

    def close(self, last_step: int | None) -> None:
        """Wait until all is uploaded.  UserError where the checkpoint of the last step cannot be, with where it is."""
        give_up = time.monotonic() + LAST_PATIENCE
        with self.changed:
            self.changed.wait_for(lambda: not self.jobs, timeout=LAST_PATIENCE)
            self.ended.set()
            for job in self.jobs:
                job.stop.set()
            self.changed.notify_all()
        if self.thread:
            self.thread.join(timeout=max(10.0, give_up - time.monotonic()))
            self.thread = None
        name = f"ckpt_{last_step}.pt"
        if last_step is not None and self.last_saved != last_step:
            kept = self.keep_apart(last_step)
            raise UserError(f"{self.url}/{name}, the last of this run, could not be uploaded: {self.last_error}; "
                            f"it is in {kept}")

    def keep_apart(self, step: int) -> Path:
        """Move a checkpoint that was not uploaded to where no later run removes it."""
        place = self.scratch.with_name(f"{self.scratch.name}.not_uploaded")
        place.mkdir(exist_ok=True)
        for path in (self.scratch / f"ckpt_{step}.pt", self.scratch / f"ckpt_{step}.optim"):
            if path.exists():
                shutil.rmtree(place / path.name, ignore_errors=True)
                os.replace(path, place / path.name)
        return place / f"ckpt_{step}.pt"


def steps_in(names) -> list[int]:
    return sorted(int(match.group(1)) for match in map(STEP_NAME.fullmatch, names) if match)


def files_of(names, step: int) -> list[str]:
    """The names of a checkpoint's objects, that which makes it one first."""
    first = f"ckpt_{step}.pt"
    return [first] * (first in names) + sorted(name for name in names if name.startswith(f"ckpt_{step}.optim/"))
