"""Packing as published: non-negative least squares histogram packing (NNLSHP, Krell et al., arXiv 2107.02027).

The strategies are all multisets of at most three lengths that fill a row exactly: 22,102 for rows of 512.  Of all the
histograms that such rows can have, NNLSHP takes the one nearest to the histogram of the data, in weighted least squares
(the lengths up to 8 have the weight 0.09).  That histogram is unique; the counts of strategies that give it are not.
"""

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import linprog
from scipy.sparse import csc_array, diags_array
from threadpoolctl import threadpool_limits

from data.packing.lpfhp import fill_rows
from data.packing.recipe import Recipe, elementary_bound

MAX_DEPTH = 3
SHORT_LENGTHS, SHORT_WEIGHT = 8, 0.09
MAX_ROUNDS = 200
LARGEST_RATIO = 1e12  # keeps the Newton equations solvable where a slack is almost 0
NEAR_ENOUGH = 1e-12  # distance to the optimum, where the largest count is 1


def nnls(histogram: np.ndarray, depth: int) -> Recipe:
    """The recipe of NNLSHP in whole rows.  fill_rows handles what rounding leaves, which is padding as published."""
    weights = published_weights(len(histogram) - 1)
    strategies = full_strategies(len(histogram) - 1, depth)
    with threadpool_limits(1, user_api="blas"):  # more threads are slower here, far slower on a busy machine
        counts = nearest_counts(strategies, histogram, weights)
    strategies, counts = few_strategies(strategies, counts)
    rows = fill_rows(strategies, np.rint(counts), histogram, depth)
    return Recipe(rows, elementary_bound(histogram, depth))


def published_weights(row_length: int) -> np.ndarray:
    return np.where(np.arange(row_length + 1) <= SHORT_LENGTHS, SHORT_WEIGHT, 1.0)


def full_strategies(row_length: int, depth: int) -> np.ndarray:
    """All strategies of at most `depth` <= 3 lengths that sum to the row length, (strategies, depth), zero padded.

    >>> full_strategies(4, depth=3)
    array([[2, 1, 1],
           [2, 2, 0],
           [3, 1, 0],
           [4, 0, 0]])
    """
    first, second = np.mgrid[:row_length + 1, :row_length + 1]
    third = row_length - first - second
    ordered = (first >= second) & (second >= third) & (third >= 0)
    strategies = np.stack([first[ordered], second[ordered], third[ordered]], axis=1)
    return strategies[(strategies[:, depth:] == 0).all(axis=1), :depth]


def nearest_counts(strategies: np.ndarray, histogram: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The counts x >= 0 of the strategies that minimise ||W (A x - h)||, with W = diag(weights) and h the histogram.

    A primal-dual interior-point method with Mehrotra's predictor and corrector: x and its slacks s = (WA)'W(Ax - h) are
    positive, and x * s goes to 0.
    """
    scale = histogram.max()
    target = weights * histogram / scale
    matrix = weighted_counts(strategies, weights)
    counts = np.full(len(strategies), target.sum() / strategies.size)
    gradient = matrix.T @ (matrix @ counts - target)
    slacks = np.maximum(np.abs(gradient), np.abs(gradient).max() * 0.1)
    for _ in range(MAX_ROUNDS):
        infeasibility = slacks - matrix.T @ (matrix @ counts - target)
        gap = counts @ slacks
        if gap < NEAR_ENOUGH and np.abs(infeasibility).max() < NEAR_ENOUGH:
            break
        solve = newton_solver(matrix, counts, slacks, infeasibility)
        count_steps, slack_steps = solve(-counts * slacks)
        length = step_length(counts, count_steps, slacks, slack_steps)
        reached = (counts + length * count_steps) @ (slacks + length * slack_steps)
        centre = (reached / gap)**3 * gap / len(counts)
        count_steps, slack_steps = solve(centre - counts * slacks - count_steps * slack_steps)
        length = 0.995 * step_length(counts, count_steps, slacks, slack_steps)
        counts, slacks = counts + length * count_steps, slacks + length * slack_steps
    return counts * scale


def few_strategies(strategies: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most one strategy for each length, with counts that give the same histogram: a vertex of the solutions.

    The interior point uses thousands of strategies; in a small data set, each of them less than once.
    """
    used = counts > 1e-6 * counts.max()
    strategies, counts, scale = strategies[used], counts[used] / counts.max(), counts.max()
    matrix = weighted_counts(strategies, np.ones(strategies.max() + 1))
    result = linprog(np.zeros(len(counts)), A_eq=matrix, b_eq=matrix @ counts, method="highs-ds")
    if not result.success:
        raise RuntimeError(f"HiGHS could not reduce the strategies: {result.message}")
    return strategies, result.x * scale


def weighted_counts(strategies: np.ndarray, weights: np.ndarray) -> csc_array:
    """W A: how often each length (row, from 0) is in each strategy (column), times the weight of the length."""
    strategy, slot = np.nonzero(strategies)
    lengths = strategies[strategy, slot]
    return csc_array((weights[lengths], (lengths, strategy)), shape=(len(weights), len(strategies)))


def newton_solver(matrix: csc_array, counts: np.ndarray, slacks: np.ndarray, infeasibility: np.ndarray):
    """A function from a change of counts * slacks to the Newton steps of both.

    The matrix has far more columns than rows, so the equations are reduced (Woodbury) to one for each length.
    """
    ratios = np.minimum(counts / slacks, LARGEST_RATIO)
    reduced = (matrix @ diags_array(ratios) @ matrix.T).toarray() + np.eye(matrix.shape[0])
    factor = cho_factor(reduced)

    def solve(change):
        step = ratios * (infeasibility + change / counts)
        count_steps = step - ratios * (matrix.T @ cho_solve(factor, matrix @ step))
        return count_steps, (change - slacks * count_steps) / counts

    return solve


def step_length(counts, count_steps, slacks, slack_steps) -> float:
    """The longest step, at most 1, that leaves all counts and slacks positive."""
    return 1.0 / max(1.0, (-count_steps / counts).max(), (-slack_steps / slacks).max())
