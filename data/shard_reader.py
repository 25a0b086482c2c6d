"""Reads shards in a child process, so that a damaged file cannot crash the training.  No torch here.

A damaged HDF5 file can crash libhdf5, or make it run forever.  Then the child dies, the parent raises a UserError that
names the file, and the next file gets a new child.  Decompression in the child also leaves the training process's
interpreter lock free.

    with ShardReader() as reader:
        rows = reader.call(read_checked_rows, shard, vocab_size)
"""

import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

from common.cli import times_to_tell
from common.errors import UserError

LONGEST_CALL = 600.0  # seconds of processor time; a shard of a gigabyte takes a few
ROOT = Path(__file__).resolve().parent.parent
CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from data.shard_reader import main; main()"
PIPE_SIZE = 1 << 20  # bytes; with the default of 64 KiB the processes take turns sixteen times as often


class InProcessReader:
    """Calls functions in this process, for commands that a damaged file is allowed to crash."""

    def call(self, function, subject, *arguments):
        return function(subject, *arguments)


IN_PROCESS = InProcessReader()


class ShardReader:
    """Calls functions in the child process, one at a time.

    A call that takes more than `longest_call` seconds of processor time ends the child.  Of one that takes long without
    (a file server that does not answer), stderr tells.
    """

    def __init__(self, longest_call: float = LONGEST_CALL):
        self.longest_call = longest_call
        self.child: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def __enter__(self) -> "ShardReader":
        self.start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def call(self, function, subject, *arguments):
        """The result of function(subject, *arguments), all of them pickled.  `subject` is a path or a shard.

        Raises UserError where the function does, and where the child died twice (once can have another cause).
        """
        with self.lock:
            for _ in range(2):
                try:
                    reply = self.ask((function, subject, *arguments), getattr(subject, "path", subject))
                except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                    death = self.reap()
                    continue
                if isinstance(reply, UserError):
                    raise reply
                return reply
        raise UserError(f"{getattr(subject, 'path', subject)}: not a readable HDF5 file (reading it {death})")

    def start(self) -> None:
        self.child = subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), str(self.longest_call)],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, pipesize=PIPE_SIZE)

    def ask(self, request, path):
        if self.child is None:
            self.start()
        pickle.dump(request, self.child.stdin)
        self.child.stdin.flush()
        reply_begins = select.poll()
        reply_begins.register(self.child.stdout, select.POLLIN)
        for pause, total in times_to_tell():
            if reply_begins.poll(1000 * pause):
                break
            print(f"warning: waiting for {path}: not read after {total:.0f} s", file=sys.stderr)
        return pickle.load(self.child.stdout)

    def reap(self) -> str:
        """Wait for the dead child; returns a description of how it ended."""
        child, self.child = self.child, None
        child.stdout.close()
        code = child.wait()
        if code == -signal.SIGPROF:
            return f"took more than {self.longest_call:.0f} seconds of processor time"
        return f"ended the process with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"

    def close(self) -> None:
        """End the child.  No call may be under way."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


def serve(requests, replies, longest_call: float) -> None:
    """The child: answer requests until the pipe is closed, also by the parent's death."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # sent to all processes of a run; the parent ends the child
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the parent was killed, and nobody reads the rows
    import_module("data.token_counts")  # and with it what the calls need: now, while the parent imports torch
    while True:
        try:
            function, *arguments = pickle.load(requests)
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, longest_call)
        try:
            reply = function(*arguments)
        except UserError as error:
            reply = error
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()
        reply = None  # free the rows before the next ones are read


def main() -> None:
    replies_only = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not mix with the replies
    serve(sys.stdin.buffer, replies_only, float(sys.argv[1]))
