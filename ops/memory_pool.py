"""Memory for large results on CPUs, used again from step to step.

    out = pool.empty(4096, 1024)  # torch.empty(4096, 1024), in memory that an earlier result no longer needs

malloc gives large blocks back to the system as soon as they are free, so that each step would pay for fresh pages anew,
which the system has to zero: up to a tenth of a step of a small model.
"""

import bisect
import math
import weakref
from collections import deque

import numpy
import torch

SMALLEST = 2**18  # elements; malloc keeps smaller blocks by itself
LARGEST_WASTE = 2  # times what is asked for: larger blocks wait for larger requests


class Pool:
    """Blocks of fp32 memory; those that no tensor uses are kept in the order of their sizes."""

    def __init__(self):
        self.idle: list[numpy.ndarray] = []
        self.lent = 0
        self.returned = deque()  # blocks and the bytes of them that were lent, from whichever thread, at any moment

    def empty(self, *shape: int) -> torch.Tensor:
        """A dense tensor with whatever its memory holds.  The memory is free again as soon as its storage is."""
        count = math.prod(shape)
        if count < SMALLEST:
            return torch.empty(shape)
        memory = self.block(count)
        lent = memory[:count].reshape(shape)  # an object of its own, which lives as long as the tensor's storage
        self.lent += lent.nbytes
        weakref.finalize(lent, self.returned.append, (memory, lent.nbytes)).atexit = False
        return torch.from_numpy(lent)

    def block(self, count: int) -> numpy.ndarray:
        """The smallest idle block that holds so many elements and is not much too large for them, else a new one."""
        self.take_back()
        place = bisect.bisect_left(self.idle, count, key=len)
        if place < len(self.idle) and len(self.idle[place]) <= LARGEST_WASTE * count:
            return self.idle.pop(place)
        return numpy.empty(count, numpy.float32)  # in huge pages, where the system has them

    def bytes_in_use(self) -> int:
        self.take_back()
        return self.lent

    def take_back(self) -> None:
        while self.returned:
            memory, size = self.returned.popleft()
            self.lent -= size
            bisect.insort(self.idle, memory, key=len)


pool = Pool()
