"""Deterministic random numbers, each a function of a key and a number.  No torch here."""

import numpy as np

STEP = np.uint64(0x9E3779B97F4A7C15)  # between the states of splitmix64: an odd number near 2**64 / golden ratio


def scrambled(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al., 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draws(keys: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Random 64-bit numbers, one for each key and number: splitmix64 seeded with the key, after that many steps."""
    return scrambled(keys + numbers.astype(np.uint64) * STEP)
