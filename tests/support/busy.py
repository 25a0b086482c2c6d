"""Processes that want a core each, beside which something is tested."""

import subprocess
import sys
from contextlib import contextmanager


@contextmanager
def busy_processes(count: int):
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()
