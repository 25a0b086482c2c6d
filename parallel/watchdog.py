"""How the ranks of a run end together when one of them fails: soon, and with its reason last on the screen.

A rank that waits in a collective for a dead one would wait until the time-out, and some backends even longer.  So a
thread of every rank looks once a second into the store in which the ranks met.  A rank that fails leaves its reason
there; the others see it, say so, and wait for that rank's last words; then all processes end.  A rank that was killed
leaves nothing: then the first rank that lost its connection to it speaks, and names the ranks that do not answer.
"""

import json
import os
import sys
import threading
import time
import traceback
from contextlib import suppress

import torch.distributed as dist

from common.errors import UserError

LOOK_EVERY = 1.0  # seconds
PATIENCE = 5.0  # seconds that a failing rank waits for the others to be told, and they for its last words
LINGER = 0.5  # seconds that rank 0 stays after the last words: it keeps the store that tells the others of them


class Lifeline:
    """This rank's share in ending the run.  `store` is for the lifeline alone: a waiting call blocks all others."""

    def __init__(self, store: dist.Store, rank: int, world_size: int):
        self.store = store
        self.rank = rank
        self.others = [other for other in range(world_size) if other != rank]
        self.released = threading.Event()
        self.ending = threading.RLock()  # taken by the thread that ends the process, and never given back
        self.thread = threading.Thread(target=self.watch, name="lifeline", daemon=True)
        self.thread.start()

    def watch(self) -> None:
        while not self.released.wait(LOOK_EVERY):
            try:
                failed = self.store.check(["failure"])
            except dist.DistError:
                say([f"rank {self.rank}: stopping, because the store is gone: rank 0 or its server died"])
                self.end(1)
            if failed:
                self.follow()

    def release(self) -> None:
        """The run ends well: look no more."""
        self.released.set()
        self.thread.join()

    def fail(self, error: BaseException) -> None:
        """End the run because of `error` on this rank.  Does not return."""
        self.released.set()
        failure = {"rank": self.rank, "code": exit_code(error)}
        lines = [] if isinstance(error, UserError | KeyboardInterrupt) else traceback.format_exception(error)
        last_line = f"{sys.argv[0]}: error: rank {self.rank}: {reason(error)}"
        try:
            told = json.loads(self.store.compare_set("failure", "", json.dumps(failure)))
            if told["rank"] != self.rank:
                self.follow()
            silent = self.silent_ranks()
            if silent:
                lines.append(f"rank {self.rank}: no answer from rank {', '.join(map(str, silent))}: killed, or cut off")
            say([*lines, last_line])
            self.store.set("said", "")
        except dist.DistError:  # the store is gone and so is rank 0: nobody can be told
            say([*lines, last_line])
        self.end(failure["code"])

    def silent_ranks(self) -> list[int]:
        """The ranks that have not heard of this rank's failure after a while."""
        silent = self.others
        give_up = time.monotonic() + PATIENCE
        while silent and time.monotonic() < give_up:
            time.sleep(0.05)
            silent = [rank for rank in silent if not self.store.check([f"heard/{rank}"])]
        return silent

    def follow(self) -> None:
        """End this process because another rank has failed, after that rank's last words."""
        with self.ending:
            code = 1
            with suppress(dist.DistError):
                failure = json.loads(self.store.get("failure"))
                if failure["rank"] == self.rank:
                    return
                code = failure["code"]
                say([f"rank {self.rank}: stopping, because rank {failure['rank']} failed"])
                self.store.set(f"heard/{self.rank}", "")
                give_up = time.monotonic() + 2 * PATIENCE
                while not self.store.check(["said"]) and time.monotonic() < give_up:
                    time.sleep(0.05)
            self.end(code)

    def end(self, code: int) -> None:
        """End this process at once: in a normal exit, the threads of a backend can wait for ever."""
        with self.ending:
            if self.rank == 0:
                time.sleep(LINGER)
            os._exit(code)


def exit_code(error: BaseException) -> int:
    """As cli.run ends: 2 after a UserError, 130 after an interrupt."""
    return 2 if isinstance(error, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1


def reason(error: BaseException) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


def say(lines: list[str]) -> None:
    sys.stdout.flush()
    for line in lines:
        print(line, file=sys.stderr)
    sys.stderr.flush()
