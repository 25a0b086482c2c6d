"""The packing methods.  A new one is one entry here, and one file with its function."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.packing import nnls
from data.packing.cutting_stock import cutting_stock
from data.packing.lpfhp import lpfhp
from data.packing.recipe import Recipe


@dataclass(frozen=True)
class PackingMethod:
    name: str
    solve: Callable[[np.ndarray, int], Recipe]  # (histogram, depth), the most sequences in a row
    help: str
    max_depth: float = math.inf


METHODS = {method.name: method for method in (  # the first is the default
    PackingMethod("cutting_stock", cutting_stock, "the fewest rows, with a proven lower bound"),
    PackingMethod("nnls", nnls.nnls, f"NNLSHP as published, at most {nnls.MAX_DEPTH} sequences a row", nnls.MAX_DEPTH),
    PackingMethod("lpfhp", lpfhp, "the longest sequence first, into the fullest row that still takes it"),
)}
