"""torch.hpu.  There is no empty_cache."""

import resource

import torch
from torch import get_rng_state, manual_seed, set_rng_state  # noqa: F401

from habana_frameworks import standin


def is_available() -> bool:
    return standin.cards() > 0


def device_count() -> int:
    return standin.cards()


def synchronize() -> None:
    if standin.lazy():
        torch._lazy.mark_step(wait=True)


def memory_allocated() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


max_memory_allocated = memory_allocated


def reset_peak_memory_stats() -> None:
    standin.record("reset_peak_memory_stats")
