"""Which of how many processes this one is, from the environment of its launcher."""

import os
from dataclasses import dataclass

from cli import UserError


@dataclass(frozen=True)
class Process:
    """A process of a run: its rank among world_size, and the card it takes on its server."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and writes checkpoints."""
        return self.rank == 0


def join(args) -> Process:
    """The place of this process in the run."""
    world_size = os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if world_size != "1":
        raise UserError(f"launched as {world_size} processes, but this version trains with one")
    return Process(local_rank=args.local_rank or 0)
