"""Packing with the fewest rows: the cutting-stock linear program, by column generation (Gilmore and Gomory, 1961).

The program chooses how many rows follow each strategy, so that there is a slot for every sequence and the number of
rows is minimal.  From depth 4 on there are too many strategies to list, so it starts with a few.  The dual values of
each solution are prices of the lengths; a knapsack finds the strategies that are worth more than the one row they cost.
They join the program, and it is solved again, until there are none.  The prices also give a lower bound on the rows.

Two things make it fast.  A slot may hold a shorter sequence, which needs few strategies and keeps the prices ascending.
And each program starts from the solution of one of half the row length, where a slot of 2n stands for the lengths
2n - 1 and 2n, so that the first prices are nearly right.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csc_array, hstack

from data.packing.lpfhp import fill_rows, longest_pack_first
from data.packing.recipe import Recipe, elementary_bound, knapsack

PRICE_UNIT = 2**40        # prices are whole numbers of 1 / PRICE_UNIT rows: sums of them are exact, and so are bounds
SMALLEST_PROGRAM = 64     # row length above which a coarser program is solved first
WORTH_KEEPING = 0.9       # a strategy with a price below this many rows is dropped; it may come back
NEAR_ENOUGH = 1e-6        # relative to the rows: smaller gains end the search; above the solver's own tolerances


@dataclass(frozen=True)
class Solution:
    strategies: np.ndarray  # (strategies, depth), lengths of the slots, zero padded
    counts: np.ndarray      # (strategies,), rows that follow each strategy, not whole
    prices: np.ndarray      # (row length + 1,), of each length, in rows
    bound: int


def cutting_stock(histogram: np.ndarray, depth: int) -> Recipe:
    """The program's solution in whole rows, a few above the bound; or that of LPFHP if it needs fewer."""
    greedy = longest_pack_first(histogram, depth)
    if greedy.total() == elementary_bound(histogram, depth):
        return Recipe(greedy, greedy.total())
    solution = fewest_rows(histogram, depth)
    rounded = fill_rows(solution.strategies, np.rint(solution.counts), histogram, depth)
    return Recipe(min(rounded, greedy, key=Counter.total), max(solution.bound, elementary_bound(histogram, depth)))


def fewest_rows(histogram: np.ndarray, depth: int) -> Solution:
    strategies, prices = starting_point(histogram, depth)
    fresh, bound = worthwhile_strategies(prices, histogram, depth)
    strategies, fewest = np.concatenate([strategies, fresh]), np.inf
    while True:
        counts, prices = solve_program(strategies, histogram)
        fresh, new_bound = worthwhile_strategies(prices, histogram, depth)
        bound = max(bound, new_bound)
        fresh = fresh[prices[fresh].sum(axis=1) > 1 + NEAR_ENOUGH]
        if not len(fresh) or bound > counts.sum() * (1 - NEAR_ENOUGH):
            return Solution(strategies, counts, prices, bound)
        if counts.sum() < fewest * (1 - NEAR_ENOUGH):  # else dropped strategies could return endlessly
            fewest = counts.sum()
            kept = (counts > 0) | (prices[strategies].sum(axis=1) > WORTH_KEEPING)
            kept[:len(histogram) - 1] = True  # one for each length: with them the program always has a solution
            strategies = strategies[kept]
        strategies = np.concatenate([strategies, fresh])


def starting_point(histogram: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Strategies that hold copies of one length each, then those of a coarser program; and prices."""
    lengths = np.arange(len(histogram))
    row_length = len(histogram) - 1
    copies = np.minimum(depth, row_length // lengths[1:])
    strategies = np.where(np.arange(depth) < copies[:, None], lengths[1:, None], 0)
    if row_length <= SMALLEST_PROGRAM:
        return strategies, lengths / row_length
    halves = np.minimum((lengths + 1) // 2, row_length // 2)
    coarse = fewest_rows(np.bincount(halves, histogram), depth)
    strategies = np.concatenate([strategies, 2 * coarse.strategies[coarse.counts > 0]])
    return strategies, np.interp(lengths / 2, np.arange(len(coarse.prices)), coarse.prices)


def solve_program(strategies: np.ndarray, histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The optimal number of rows for each of these strategies, and the price of each length.

    One constraint for each length: its slots, plus those handed down by the next longer length, minus those handed down
    to the next shorter one, are at least as many as its sequences.
    """
    row_length = len(histogram) - 1
    strategy, slot = np.nonzero(strategies)
    slots = csc_array((np.ones(len(strategy)), (strategies[strategy, slot], strategy)),
                      shape=(row_length + 1, len(strategies)))
    longer = np.arange(2, row_length + 1)
    hand_down = csc_array((np.repeat([-1.0, 1.0], row_length - 1),
                           (np.concatenate([longer, longer - 1]), np.tile(longer - 2, 2))),
                          shape=(row_length + 1, row_length - 1))
    cost = np.concatenate([np.ones(len(strategies)), np.zeros(row_length - 1)])
    scale = histogram.max()  # the solver's tolerances are absolute
    result = linprog(cost, A_ub=-hstack([slots, hand_down], format="csc")[1:], b_ub=-histogram[1:] / scale,
                     method="highs-ds")
    if not result.success:
        raise RuntimeError(f"HiGHS could not solve the packing program: {result.message}")
    prices = np.concatenate([[0.0], -result.ineqlin.marginals])
    return result.x[:len(strategies)] * scale, np.maximum.accumulate(np.maximum(prices, 0.0))


def worthwhile_strategies(prices: np.ndarray, histogram: np.ndarray, depth: int) -> tuple[np.ndarray, int]:
    """For each length the most valuable strategy with it, (strategies, depth), and a lower bound on the rows.

    The bound is the value of all sequences, divided by that of the most valuable row.
    """
    prices = np.rint(prices * PRICE_UNIT).astype(np.int64)
    best, choices = knapsack(prices, depth)
    lengths = np.arange(1, len(histogram))
    strategies = np.zeros((len(lengths), depth), np.int64)
    strategies[:, 0] = lengths
    room = len(histogram) - 1 - lengths
    for column, choice in enumerate(reversed(choices[:-1]), start=1):
        strategies[:, column] = choice[room]
        room = room - strategies[:, column]
    total = sum(price * count for price, count in zip(prices.tolist(), histogram.tolist(), strict=True))
    return np.unique(-np.sort(-strategies, axis=1), axis=0), int(-(-total // int(best[-1])))
