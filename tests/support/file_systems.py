"""Programs in surroundings that a file system, a container or a quota makes, for as long as they run."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# The system calls by their numbers: flock, and fcntl, which fails only where it locks.
CALLS = {"x86_64": {"flock": 73, "fcntl": 72}, "aarch64": {"flock": 32, "fcntl": 25}}
WITHOUT_LOCKS = """
import ctypes, errno, runpy, struct, sys

def filter_of(flock, fcntl):
    '''A seccomp program: flock and the locks of fcntl fail with ENOLCK.'''
    load, equal, give = 0x20, 0x15, 0x06
    fail = lambda number: (give, 0, 0, 0x00050000 | number)
    program = [(load, 0, 0, 0), (equal, 0, 1, flock), fail(errno.ENOLCK), (equal, 0, 6, fcntl)]
    program += [(load, 0, 0, 24)]  # the second argument
    program += [(equal, 3, 0, 6), (equal, 2, 0, 7), (equal, 1, 0, 37), (equal, 0, 1, 38), fail(errno.ENOLCK)]
    program += [(give, 0, 0, 0x7fff0000)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program), len(program)

code, count = filter_of(**CALLS)
buffer = ctypes.create_string_buffer(code)
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", count, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None, use_errno=True)
for option, first, second in ((38, 1, 0), (22, 2, ctypes.addressof(program))):  # no new privileges; the filter
    if libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), 0, 0):
        sys.exit(f"no seccomp here: {ctypes.get_errno()}")
sys.argv = sys.argv[1:]
sys.path[0] = ROOT
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROBE = """
import fcntl, sys
for lock in (fcntl.flock, fcntl.lockf):
    try:
        lock(0, fcntl.LOCK_SH)
        sys.exit('a lock was made')
    except OSError as error:
        print(error.errno)
"""


def without_locks(folder) -> list[str]:
    """What to put before a program so that, for it and its children, no lock can be had."""
    if platform.machine() not in CALLS:
        pytest.skip(f"the numbers of the system calls of {platform.machine()} are not known here")
    program = WITHOUT_LOCKS.replace("CALLS", repr(CALLS[platform.machine()])).replace("ROOT", repr(str(ROOT)))
    command = [sys.executable, "-c", program]
    (Path(folder) / "probe.py").write_text(PROBE, encoding="utf-8")
    with open(Path(folder) / "probe.py", "r+b") as file:
        probe = subprocess.run([*command, str(Path(folder) / "probe.py")], stdin=file, capture_output=True, text=True)
    if "no seccomp" in probe.stderr:
        pytest.skip(probe.stderr.strip())
    assert probe.stdout.split() == ["37", "37"], probe.stderr
    return command
