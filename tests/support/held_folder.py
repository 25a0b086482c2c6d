"""Processes that hold the lock of a folder, for the tests of those that must not."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import os, signal, sys
from common import cli, locks
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
locks.FIRST_RENEWAL = locks.RENEWAL_SECONDS = 0.1
def main():
    with locks.folder_lock(sys.argv[1], "--output_dir x"):
        print(os.getpid(), flush=True)
        for word in sys.stdin:
            {actions}
cli.run(main)
"""
OTHER_HOST = ("unshare", "--pid", "--uts", "--fork", "--mount-proc", "bash", "-c", 'hostname other; exec "$@"', "bash")


class held_folder:
    """A process that holds the lock of a folder in the block; `actions` (Python) run for each line that it gets."""

    def __init__(self, folder, actions: str = "pass", prefix: tuple = ()):
        command = [*prefix, sys.executable, "-c", PROGRAM.format(actions=actions), str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True, start_new_session=True)
        self.pid = int(self.process.stdout.readline())  # as the process sees it

    def __enter__(self) -> "held_folder":
        return self

    def __exit__(self, *error) -> None:
        with suppress(ProcessLookupError):  # its children are killed too
            os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:
            """Wait for it, and close the pipes."""

    def do(self) -> None:
        self.process.stdin.write("do\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Let it leave the block; returns its exit code and what it printed on stderr."""
        self.process.stdin.close()
        return self.process.wait(timeout=60), self.process.stderr.read()


def other_host() -> tuple:
    """What to put before a command so that it runs as on another host; skips the test where that cannot be."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here")
    probe = subprocess.run([*OTHER_HOST, "true"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"no process namespace can be made here: {probe.stderr.strip()}")
    return OTHER_HOST
