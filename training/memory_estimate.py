"""The peak memory of a training step, extrapolated from two small micro-batches.

A traced step records what each operation allocates, and when each tensor is freed.  The bytes in use after an
operation are linear in the rows of the micro-batch, so traces with two and four rows give the peak for any number of
rows, without a formula for the architecture, the kernels, the precision or --checkpoint_activations.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ops.memory_pool import pool

FEW, MORE = 2, 4  # rows of the traces; some operations treat an axis of length 1 differently


class LiveBytes(TorchDispatchMode):
    """Records in `trace` the bytes of new tensors that are in use after each operation."""

    def __init__(self):
        super().__init__()
        self.live = -pool.bytes_in_use()  # the pool allocates without a PyTorch operation
        self.trace = []
        self.known = weakref.WeakSet()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch loads torch.compile for it: 70 MB and a second that the training does not take

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        present = storages((args, kwargs))
        result = function(*args, **(kwargs or {}))
        for storage in storages(result):
            self.count(storage, present)
        self.trace.append(self.live + pool.bytes_in_use())
        return result

    def count(self, storage, present) -> None:
        """Count a storage unless it is in `present`: views and in-place results allocate none."""
        if storage not in self.known and all(storage is not other for other in present):
            self.known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self.freed, storage.nbytes())

    def freed(self, size: int) -> None:
        self.live -= size


def storages(values) -> list:
    """The storages of the tensors in nested arguments or results."""
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def step_peak(model, precision, batch: dict[str, torch.Tensor], rows: int, accumulates: bool) -> int:
    """Bytes of gradients and activations at the peak of a step with `rows` rows in each micro-batch.

    `batch` has at least one row; `accumulates`: there are gradients of earlier micro-batches.  Clears the gradients.
    """
    if rows <= MORE:
        peak = max(step_trace(model, precision, batch, rows, accumulates))
    else:
        few, more = (step_trace(model, precision, batch, count, accumulates) for count in (FEW, MORE))
        assert len(few) == len(more), "a step's operations do not depend on the number of rows"
        peak = max(low + (high - low) * (rows - FEW) // (MORE - FEW) for low, high in zip(few, more, strict=True))
    return peak + (bytes_of(model) if accumulates else 0)


def step_trace(model, precision, batch, rows: int, accumulates: bool) -> list[int]:
    """Bytes in use after each operation of forward and backward."""
    repeated = {key: values[:1].expand(rows, -1).contiguous() for key, values in batch.items()}
    for _ in range(2 if accumulates else 1):
        with LiveBytes() as memory:
            with precision.autocast():
                loss = model(repeated)["loss"]
            precision.backward(loss)
            del loss
    model.zero_grad()
    return memory.trace


def bytes_of(model) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
