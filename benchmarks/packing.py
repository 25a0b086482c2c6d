"""Packing methods on the lengths of English Wikipedia, and the whole command on synthetic rows of those lengths.

    python benchmarks/packing.py [--json] [--rows 1000000]

The histogram counts 16,279,552 sequences of up to 512 tokens (Krell et al., arXiv 2107.02027).  Times are the best of
the repeats.  The command packs on one process; its data, about 1 GB for a million rows, are made first and not timed.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import scipy.optimize
from tqdm import tqdm

from measuring import ROOT, machine, report  # puts the repository's root on the path

# isort: split
from common import cli
from data.packing import nnls
from data.packing.methods import METHODS, PackingMethod
from tests.support.synthetic import write_unpacked_shard

DEPTHS = (3, 4, 8, 16)
SMALL_SET = 10_000  # sequences drawn from the histogram
ROWS_PER_SHARD, PREDICTIONS = 20_000, 80


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=cli.positive_int, default=3, help="timed repeats of each method")
    parser.add_argument("--rows", type=int, default=1_000_000, help="synthetic rows for the command; 0: leave it out")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    histogram = wikipedia_histogram()
    entries = measure_all(histogram, DEPTHS, args.repeats)
    small = np.bincount(np.random.default_rng(0).choice(len(histogram), SMALL_SET, p=histogram / histogram.sum()),
                        minlength=len(histogram))
    figures = {"packing": entries, "small_set": measure_all(small, DEPTHS[:2], args.repeats),
               "plain_nnls": measure_plain_nnls(histogram, entries, args.repeats),
               "command": measure_command(histogram, args.rows) if args.rows else None, "machine": machine("scipy")}
    report(figures, args.json, lines(figures))


def wikipedia_histogram() -> np.ndarray:
    """How many sequences of English Wikipedia have each length from 0 to 512."""
    text = (ROOT / "benchmarks" / "wikipedia_length_histogram_512.json").read_text(encoding="utf-8")
    return np.array([0, *json.loads(text)["histogram"]])


def efficiency(histogram: np.ndarray, rows: int) -> float:
    """The share of real tokens in so many rows."""
    row_length = len(histogram) - 1
    return float(histogram @ np.arange(row_length + 1)) / (rows * row_length)


def timed(function, *arguments):
    """A function's result, and the seconds it took."""
    start = time.perf_counter()
    result = function(*arguments)
    return result, time.perf_counter() - start


def measure_all(histogram: np.ndarray, depths: tuple[int, ...], repeats: int) -> list[dict]:
    """One entry for each depth and method."""
    entries = [measure(method, depth, histogram, repeats) for depth in depths for method in METHODS.values()
               if depth <= method.max_depth]
    for entry in entries:  # a bound that any method proves holds for all
        entry["bound"] = max(other["bound"] for other in entries if other["depth"] == entry["depth"])
    return entries


def measure(method: PackingMethod, depth: int, histogram: np.ndarray, repeats: int) -> dict:
    runs = [timed(method.solve, histogram, depth) for _ in range(repeats)]
    recipe = runs[0][0]
    return {"method": method.name, "depth": depth, "efficiency": efficiency(histogram, recipe.row_count),
            "rows": recipe.row_count, "bound": recipe.bound, "seconds": min(seconds for _, seconds in runs)}


def measure_plain_nnls(histogram: np.ndarray, entries: list[dict], repeats: int) -> dict:
    """NNLSHP as published: scipy.optimize.nnls over all strategies; what is left over after rounding goes alone."""
    weights = nnls.published_weights(len(histogram) - 1)
    strategies = nnls.full_strategies(len(histogram) - 1, nnls.MAX_DEPTH)
    matrix = nnls.weighted_counts(strategies, weights).toarray()

    def solve():
        counts, _ = scipy.optimize.nnls(matrix, weights * histogram, maxiter=20 * matrix.shape[1])
        return np.rint(counts).astype(np.int64)

    runs = [timed(solve) for _ in range(repeats)]
    counts, seconds = runs[0][0], min(seconds for _, seconds in runs)
    slots = np.bincount(strategies.ravel(), np.repeat(counts, nnls.MAX_DEPTH), len(histogram))
    rows = int(counts.sum() + np.maximum(histogram - slots, 0)[1:].sum())
    ours = next(entry for entry in entries if entry["method"] == "nnls")
    return {"strategies": len(strategies), "efficiency": efficiency(histogram, rows), "rows": rows, "seconds": seconds,
            "times_slower": seconds / ours["seconds"]}


def measure_command(histogram: np.ndarray, rows: int) -> dict:
    """Pack about so many synthetic rows with one process: its time, its processor time and its largest memory."""
    lengths = np.repeat(np.arange(len(histogram)), np.rint(histogram * (rows / histogram.sum())).astype(np.int64))
    np.random.default_rng(0).shuffle(lengths)
    with tempfile.TemporaryDirectory() as folder:
        unpacked, packed = Path(folder) / "unpacked", Path(folder) / "packed"
        for start in tqdm(range(0, len(lengths), ROWS_PER_SHARD), desc="making rows", disable=None):
            write_unpacked_shard(unpacked / f"synthetic_training_{start // ROWS_PER_SHARD}.hdf5",
                                 lengths[start:start + ROWS_PER_SHARD], start, len(histogram) - 1, PREDICTIONS)
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, ROOT / "pack_pretraining_data_pytorch.py", "--input_dir", unpacked, "--output_dir", packed,
             "--max_sequence_length", str(len(histogram) - 1), "--max_predictions_per_sequence", str(PREDICTIONS),
             "--n_processes", "1", "--disable_progress_bar"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the packing command ended with exit code {process.returncode}")
        seconds = time.perf_counter() - start
        metadata = json.loads((Path(folder) / "packed_metadata.json").read_text(encoding="utf-8"))
    core_seconds = usage.ru_utime + usage.ru_stime
    return {"sequences": len(lengths), "rows": metadata["new_number_of_samples"],
            "bound": metadata["lower_bound_of_samples"], "efficiency": metadata["packing_efficiency"],
            "seconds": seconds, "core_seconds": core_seconds, "sequences_per_core_second": len(lengths) / core_seconds,
            "peak_memory_bytes": usage.ru_maxrss * 1024}


def lines(figures: dict) -> list[str]:
    """The figures for people."""
    found = ["method         depth  efficiency       rows      bound   seconds"]
    for title, entries in (("", figures["packing"]), (f"{SMALL_SET:,} of them", figures["small_set"])):
        found += [title] * bool(title)
        found += [f"{entry['method']:14} {entry['depth']:5} {entry['efficiency']:11.4%} {entry['rows']:10,} "
                  f"{entry['bound']:10,} {entry['seconds']:9.3f}" for entry in entries]
    plain, command = figures["plain_nnls"], figures["command"]
    found.append(f"plain scipy.optimize.nnls over {plain['strategies']:,} strategies: {plain['efficiency']:.4%} in "
                 f"{plain['seconds']:.1f} s, {plain['times_slower']:.1f} times as long as nnls")
    if command:
        found.append(f"the whole command: {command['sequences']:,} sequences to {command['rows']:,} rows in "
                     f"{command['seconds']:.0f} s, {command['sequences_per_core_second']:,.0f} sequences a second and "
                     f"core, at most {command['peak_memory_bytes'] / 1e6:.0f} MB")
    return found


if __name__ == "__main__":
    cli.run(main)
