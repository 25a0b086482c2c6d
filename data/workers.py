"""Runs tasks in this process, in several processes, or on MPI ranks.  No torch here.

    python bertPrep.py --n_processes 1            this process
    python bertPrep.py --n_processes 8            eight processes of this machine
    mpirun -n 32 … -m mpi4py.futures bertPrep.py  31 workers on any number of servers with a shared folder
"""

import signal
import sys
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from common.cli import escape_output
from common.errors import UserError

TASKS_AHEAD = 2  # for each worker: enough to keep it busy, but few results wait in memory


class SerialExecutor(Executor):
    workers, description = 1, "one process"

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # raised by result(), as by a pool of processes
            future.set_exception(error)
        return future


def open_pool(n_processes: int):
    """An executor with two more attributes, `workers` (their number) and `description`."""
    ranks = mpi_ranks()
    if ranks > 1:
        from mpi4py.futures import MPIPoolExecutor

        pool = MPIPoolExecutor()
        pool.workers, pool.description = ranks - 1, f"{ranks} MPI ranks"
        return pool
    if n_processes == 1:
        return SerialExecutor()
    # Fresh interpreters: a fork would copy this process's memory, and locks that its threads hold.
    try:
        pool = ProcessPoolExecutor(n_processes, get_context("spawn"), prepare_worker)
    except OSError as error:
        raise UserError(f"--n_processes {n_processes}: processes share locks in /dev/shm, which cannot be used here: "
                        f"{error.strerror}; make room in it (docker run --shm-size), or give --n_processes 1") from None
    pool.workers, pool.description = n_processes, f"{n_processes} processes"
    return pool


def prepare_worker() -> None:
    """Ignore Ctrl-C, which reaches every process of a terminal: the parent ends the others."""
    escape_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def mpi_ranks() -> int:
    """The number of ranks if this was started with `python -m mpi4py.futures`, else 1."""
    if "mpi4py.futures" not in sys.modules:
        return 1
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_size()


def ordered_map(pool, function, tasks):
    """Yield function(*task) for each task, in order, with only a few tasks and results in memory at a time."""
    waiting = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, *task))
            while len(waiting) > TASKS_AHEAD * pool.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed; if that was for lack of memory, give a smaller "
                        "--n_processes") from None
    finally:  # if the caller stops early, no task may still be writing while it cleans up
        wait([future for future in waiting if not future.cancel()])
