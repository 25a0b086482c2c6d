"""Starts of the ranks in one store: torchrun's agent hosts it, and it outlives the ranks that torchrun starts again."""

import threading
import time
import uuid
from contextlib import suppress

import torch.distributed as dist

ALL_CONNECTED = "all connected"  # rank 0 sets this when every rank is there
POLL_SECONDS = 0.05


def name_of_start(store: dist.Store, answers: dist.Store | None, world_size: int, rank: int) -> str:
    """A name that all ranks of this start have, and those of no other start.

    The store still holds what earlier starts wrote, and the agents may differ in how often they have restarted
    (TORCHELASTIC_RESTART_COUNT): one that saw a rank fail counts, one that saw a server come does not.  So every rank
    asks under a word of its own, and rank 0 answers with the name, over a connection of its own, `answers`.
    """
    word = uuid.uuid4().hex
    if rank == 0:
        threading.Thread(target=answer_ranks, args=(answers, word, world_size), name="name of start",
                         daemon=True).start()
        return word
    store.set(f"asks/{rank}", word)
    return store.get(f"start of {word}").decode()


def answer_ranks(store: dist.Store, name: str, world_size: int) -> None:
    """Tell each rank the name, until all are connected.  Nobody listens where a word is of an earlier start."""
    answered = set()
    with suppress(dist.DistError):  # the store is gone: the watchdog says so
        while not store.check([f"{name}/{ALL_CONNECTED}"]):
            for asks in (f"asks/{rank}" for rank in range(1, world_size)):
                word = store.get(asks).decode() if store.check([asks]) else None
                if word not in (None, *answered):
                    store.set(f"start of {word}", name)
                    answered.add(word)
            time.sleep(POLL_SECONDS)
