"""Worker processes that end cleanly: on Ctrl-C, on SIGTERM, and when one of them is killed."""

import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from cli import UserError


@contextmanager
def process_pool(n_processes: int):
    """Yield a function that maps as map() does, over processes; over this process alone where `n_processes` is 1.

    The processes are spawned, so that no thread or lock of this one (HDF5, BLAS) is copied half-way.
    """
    if n_processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, initializer=leave_interrupts_to_parent) as pool:
        try:
            yield pool.map
        except BrokenProcessPool:
            raise UserError("a worker process was killed (out of memory?); try a smaller --n_processes") from None
        finally:
            pool.shutdown(cancel_futures=True)


def leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches every process of a terminal: only the parent acts on it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def sigterm_as_interrupt():
    """Let SIGTERM end the block as Ctrl-C does, so that temporary files are removed."""
    def interrupt(signal_number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
