"""Ends all ranks of a run soon after one of them fails, with the reason as the last line of the output.

A rank that waits in a collective for a dead rank would wait until the time-out, with some backends even longer.  So a
thread of every rank polls the store through which the ranks connected.  A rank that fails writes its failure there; the
others acknowledge it and wait until that rank has printed its error; then all processes end.  A rank that was killed
writes nothing: then the first rank whose collective fails writes the failure, and names the ranks that do not answer.
"""

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from common.errors import UserError
from common.locks import release_all

POLL_SECONDS = 1.0
ACKNOWLEDGE_TIMEOUT = timedelta(seconds=5)  # a failed rank waits for the others that long
LINGER_SECONDS = 0.5  # rank 0 hosts the store, and stays that long after the report so that the others can read it


class RankWatchdog:
    """The watchdog of one rank.  `store` is a connection for it alone: a waiting call blocks the connection."""

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store = store
        self.rank = rank
        self.others = [other for other in range(world_size) if other != rank]
        self.stopped = threading.Event()
        self.ending = threading.RLock()  # held by the thread that ends the process, and never released
        self.thread = threading.Thread(target=self.watch, name="rank watchdog", daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.stopped.wait(POLL_SECONDS):
            try:
                failed = self.store.check(["failure"])
            except dist.DistError:
                print_lines([f"rank {self.rank}: stopping, because the store is gone: rank 0 or its server died"])
                self.end(1)
            if failed:
                self.end_with_failed_rank()

    def stop(self) -> None:
        """Stop polling: the run ends normally."""
        self.stopped.set()
        self.thread.join()

    def fail(self, error: BaseException) -> None:
        """End the run because of `error` on this rank.  Does not return."""
        self.stopped.set()
        failure = {"rank": self.rank, "code": exit_code(error)}
        lines = [] if isinstance(error, UserError | KeyboardInterrupt) else traceback.format_exception(error)
        last_line = f"{sys.argv[0]}: error: rank {self.rank}: {in_one_line(error)}"
        try:
            first_failure = json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
            if first_failure["rank"] != self.rank:
                self.end_with_failed_rank()
            silent = missing_ranks(self.store, "acknowledged", self.others, ACKNOWLEDGE_TIMEOUT)
            if silent:
                lines.append(f"rank {self.rank}: no answer from rank {', '.join(map(str, silent))}: killed, or cut off")
            print_lines([*lines, last_line])
            self.store.set("reported", "")
        except dist.DistError:  # the store is gone with rank 0
            print_lines([*lines, last_line])
        self.end(failure["code"])

    def end_with_failed_rank(self) -> None:
        """End this process because another rank has failed, after that rank has printed its error."""
        with self.ending:
            code = 1
            with suppress(dist.DistError):
                failure = json.loads(self.store.get("failure"))
                if failure["rank"] == self.rank:
                    return
                code = failure["code"]
                print_lines([f"rank {self.rank}: stopping, because rank {failure['rank']} failed"])
                self.store.set(f"acknowledged/{self.rank}", "")
                self.store.wait(["reported"], 2 * ACKNOWLEDGE_TIMEOUT)
            self.end(code)

    def end(self, code: int) -> None:
        """End this process at once: a normal exit can wait forever for the threads of a backend."""
        with self.ending:
            if self.rank == 0:
                time.sleep(LINGER_SECONDS)
            release_all()
            os._exit(code)


def missing_ranks(store: dist.Store, event: str, ranks: list[int], timeout: timedelta) -> list[int]:
    """Wait until each of these ranks has set `event`/RANK in the store; after the timeout, the ranks that have not."""
    give_up = time.monotonic() + timeout.total_seconds()
    while ranks := [rank for rank in ranks if not store.check([f"{event}/{rank}"])]:
        if time.monotonic() > give_up:
            break
        time.sleep(0.05)
    return ranks


def exit_code(error: BaseException) -> int:
    """As cli.run: 2 after a UserError, 130 after an interrupt."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def in_one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


def print_lines(lines: list[str]) -> None:
    sys.stdout.flush()
    print(*lines, sep="\n", file=sys.stderr, flush=True)
