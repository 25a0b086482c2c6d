"""A pool of memory for large results on CPUs, reused from step to step.

    out = pool.empty(4096, 1024)  # torch.empty(4096, 1024), in memory that an earlier result no longer needs

malloc returns large blocks to the system as soon as they are freed, so each step would get new pages, which the system
zeroes first: up to a tenth of a small model's step.
"""

import bisect
import math
import weakref
from collections import deque

import numpy
import torch

MIN_ELEMENTS = 2**18  # malloc keeps smaller blocks itself
MAX_WASTE = 2  # largest ratio of a block's size to the request's


class Pool:
    """Blocks of fp32 memory; the free ones are kept sorted by size."""

    def __init__(self):
        self.free_blocks: list[numpy.ndarray] = []
        self.allocated_bytes = 0
        self.released = deque()  # (block, allocated bytes) of tensors that died, in any thread, at any moment

    def empty(self, *shape: int) -> torch.Tensor:
        """An uninitialised dense tensor.  Its memory is released when its storage dies."""
        count = math.prod(shape)
        if count < MIN_ELEMENTS:
            return torch.empty(shape)
        memory = self.block(count)
        array = memory[:count].reshape(shape)  # a new object, which lives as long as the tensor's storage
        self.allocated_bytes += array.nbytes
        weakref.finalize(array, self.released.append, (memory, array.nbytes)).atexit = False
        return torch.from_numpy(array)

    def block(self, count: int) -> numpy.ndarray:
        """The smallest free block of at least `count` elements and at most MAX_WASTE times as many, else a new one."""
        self.reclaim()
        index = bisect.bisect_left(self.free_blocks, count, key=len)
        if index < len(self.free_blocks) and len(self.free_blocks[index]) <= MAX_WASTE * count:
            return self.free_blocks.pop(index)
        return numpy.empty(count, numpy.float32)  # numpy asks for huge pages, torch.empty does not

    def bytes_in_use(self) -> int:
        self.reclaim()
        return self.allocated_bytes

    def reclaim(self) -> None:
        """Make the released blocks free."""
        while self.released:
            memory, size = self.released.popleft()
            self.allocated_bytes -= size
            bisect.insort(self.free_blocks, memory, key=len)


pool = Pool()
