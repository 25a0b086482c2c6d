"""The one place that decides where the work of a stage runs: in this process, on several, or on the ranks of MPI.

    python bertPrep.py --n_processes 1            this process
    python bertPrep.py --n_processes 8            eight processes of this machine
    mpirun -n 32 … -m mpi4py.futures bertPrep.py  31 workers on any number of servers that share the folder

A stage sees only `submit`; results come back in the order of the tasks, so that what it writes does not depend on the
choice.
"""

import signal
import sys
from collections import deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from common.errors import UserError

TASKS_AHEAD = 2  # for each worker: enough that none waits, few enough that waiting results stay small


class SerialExecutor(Executor):
    """Runs each task at once, where it is submitted."""

    workers, description = 1, "one process"

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # handed to whoever asks for the result, as a pool of processes does
            future.set_exception(error)
        return future


def open_pool(n_processes: int):
    """An executor with the attributes `workers` and `description`; to be used in a `with` statement."""
    ranks = mpi_ranks()
    if ranks > 1:
        from mpi4py.futures import MPIPoolExecutor

        pool = MPIPoolExecutor()
        pool.workers, pool.description = ranks - 1, f"{ranks} MPI ranks"
        return pool
    if n_processes == 1:
        return SerialExecutor()
    # A fresh interpreter each: a fork would copy this process's memory and whatever its threads hold locked.
    pool = ProcessPoolExecutor(n_processes, get_context("spawn"), leave_interrupts_to_parent)
    pool.workers, pool.description = n_processes, f"{n_processes} processes"
    return pool


def leave_interrupts_to_parent() -> None:
    """Ctrl-C reaches every process of a terminal; only the parent acts on it, and ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def mpi_ranks() -> int:
    """How many ranks run under `python -m mpi4py.futures`; 1 where that is not how this was started."""
    if "mpi4py.futures" not in sys.modules:
        return 1
    from mpi4py import MPI

    return MPI.COMM_WORLD.Get_size()


def ordered_map(pool, function, tasks):
    """Yield function(*task) for each task, in order, keeping only a few tasks and results in memory at a time."""
    waiting = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(function, *task))
            while len(waiting) > TASKS_AHEAD * pool.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process was killed; where that was for lack of memory, a smaller --n_processes "
                        "helps") from None
    finally:  # when this is left early, no task may go on writing behind the back of whoever cleans up
        wait([future for future in waiting if not future.cancel()])
