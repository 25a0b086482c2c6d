"""Writes checkpoints in a thread; the training waits only while its state is copied to host memory."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from checkpoint.folder import newest_name, write_checkpoint
from checkpoint.remote_folder import RemoteFolder
from common.errors import UserError
from common.files import remove_leftovers


class CheckpointWriter:
    """Writes the checkpoints of a run, one after the other.

    A write error (a full disk) is reported to `warn` and does not end the run; older checkpoints are kept.  Only the
    last one must be written: close() tries again, and raises UserError.
    """

    def __init__(self, folder, device, report, warn):
        self.folder = folder
        self.device = device
        self.report = report
        self.warn = warn
        self.copies: dict[torch.Tensor, torch.Tensor] = {}
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint-writer")
        self.writing: Future | None = None
        # Number, state and protected numbers of the newest one, until it is on disk.
        self.unwritten: tuple[int, dict, set[int]] | None = None
        self.is_remote = isinstance(folder, RemoteFolder)
        self.last: int | None = None  # the number of the newest one

    def save(self, number: int, protected: set[int], state: dict) -> None:
        """Begin to write ckpt_<number>.pt, after the one before, because both are copied to the same memory.

        The checkpoints `protected` are not removed.
        """
        self.finish()
        self.unwritten, self.last = (number, self.copied(state), protected), number
        self.device.synchronize()
        self.writing = self.thread.submit(self.write)

    def copied(self, state: dict) -> dict:
        """Nested dicts and lists with every tensor in host memory; a tensor that occurs twice is copied once.

        Reuses the memory of the copy before, because fresh memory would take as long as the copy itself.
        """
        before, self.copies = self.copies, {}

        def copied(value):
            if isinstance(value, torch.Tensor):
                if value not in self.copies:
                    self.copies[value] = self.device.host_copy(value, before.get(value))
                return self.copies[value]
            if isinstance(value, dict):
                return {key: copied(item) for key, item in value.items()}
            return [copied(item) for item in value] if isinstance(value, list) else value

        return copied(state)

    def write(self):
        remove_leftovers(self.folder, ".ckpt_*")  # a file each; this run holds the folder
        return write_checkpoint(self.folder, *self.unwritten)

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, and report it or the error."""
        if self.writing is None:
            return
        writing, self.writing = self.writing, None
        try:
            path = writing.result()
            if not self.is_remote:  # of which its uploads are reported
                self.report(f"saved {path}")
            self.unwritten = None
        except OSError as error:
            self.warn(f"ckpt_{self.unwritten[0]}.pt could not be written ({error}); those before it are kept, "
                      f"and the training continues")

    def report_when_written(self) -> None:
        if self.writing is not None and self.writing.done():
            self.finish()
        if self.is_remote:
            self.folder.report(self.report, self.warn)

    def close(self) -> None:
        """Wait until the last checkpoint is written, and uploaded.  UserError where it cannot be."""
        self.finish()
        self.thread.shutdown()
        try:
            if self.unwritten is not None:
                path = self.write()
                if not self.is_remote:
                    self.report(f"saved {path}")
            if self.is_remote:
                try:
                    self.folder.close(self.last)
                finally:
                    self.folder.report(self.report, self.warn)
        except OSError as error:
            raise UserError(f"ckpt_{self.unwritten[0]}.pt, the last of this run, could not be written: {error}; "
                            f"the newest is {newest_name(self.folder)}") from None
