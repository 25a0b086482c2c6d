"""Plots a packing: how long the sequences are, how full the rows are, and how many sequences they hold."""

import numpy as np

from common.files import replacing
from data.packing.recipe import Recipe


def plot_packing(recipe: Recipe, histogram: np.ndarray, output) -> None:
    """Write the three plots to a PNG file."""
    from matplotlib.figure import Figure

    row_length = len(histogram) - 1
    used = np.zeros(row_length + 1, np.int64)
    held = np.zeros(max(map(len, recipe.rows)) + 1, np.int64)
    for strategy, count in recipe.rows.items():
        used[sum(strategy)] += count
        held[len(strategy)] += count

    figure = Figure(figsize=(15, 4), layout="constrained")
    lengths, fill, sequences = figure.subplots(1, 3)
    lengths.step(np.arange(row_length + 1), histogram, where="mid")
    lengths.set(title=f"{histogram.sum():,} sequences", xlabel="tokens", ylabel="sequences", yscale="symlog")
    fill.step(np.arange(row_length + 1), np.cumsum(histogram) / histogram.sum(), where="mid", label="unpacked")
    fill.step(np.arange(row_length + 1), np.cumsum(used) / recipe.row_count, where="mid", label="packed")
    real_tokens = used @ np.arange(row_length + 1) / recipe.row_count / row_length
    fill.set(title=f"Fill: {real_tokens:.2%} of all tokens are real",
             xlabel="real tokens in a row", ylabel="share of the rows with at most this many")
    fill.legend()
    sequences.bar(np.arange(1, len(held)), held[1:] / recipe.row_count)
    sequences.set(title=f"{recipe.row_count:,} rows, {histogram.sum() / recipe.row_count:.3f} sequences each",
                  xlabel="sequences in a row", ylabel="share of the rows")
    for axis in (lengths, fill, sequences):
        axis.grid(alpha=0.3)
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
