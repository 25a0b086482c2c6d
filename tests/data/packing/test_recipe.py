"""Recipes: what every packing method must hold for any lengths, and the figures it is known by."""

import doctest
from functools import cache
from importlib import import_module
from itertools import combinations_with_replacement

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import nnls
from data.packing.assignment import RowAssignment, ranks_within, shuffled
from data.packing.methods import METHODS
from data.packing.recipe import knapsack, reference_index
from packing import wikipedia_histogram


@st.composite
def histograms(draw, most_sequences=10**9):
    """Row lengths on both sides of the size from which the linear program is solved coarsely first."""
    row_length = draw(st.sampled_from([1, 2, 3, 7, 8, 24, 64, 65, 130]))
    counts = draw(st.dictionaries(st.integers(1, row_length), st.integers(1, most_sequences), min_size=1))
    return np.bincount(list(counts), list(counts.values()), minlength=row_length + 1).astype(np.int64)


def check(recipe, histogram, depth):
    row_length = len(histogram) - 1
    assert (recipe.histogram(row_length) == histogram).all()
    assert all(1 <= len(strategy) <= depth and sum(strategy) <= row_length for strategy in recipe.rows)
    assert min(recipe.rows.values()) > 0
    assert recipe.row_count >= recipe.bound


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@given(histogram=histograms(), depth=st.sampled_from([1, 2, 3, 5, 200]))
@settings(max_examples=60, deadline=None)
def test_packing_keeps_every_sequence_in_rows_neither_too_long_nor_too_deep(method, histogram, depth):
    depth = min(depth, method.max_depth)
    check(method.solve(histogram, depth), histogram, depth)


@given(histogram=histograms(), depth=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_cutting_stock_never_needs_more_rows_than_longest_pack_first(histogram, depth):
    ours, greedy = (METHODS[name].solve(histogram, depth) for name in ("cutting_stock", "lpfhp"))
    assert ours.row_count <= greedy.row_count


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7), depth=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_bounds_are_never_above_the_true_optimum(lengths, depth):
    optimum = fewest_rows(tuple(sorted(lengths)), 12, depth)
    histogram = np.bincount(lengths, minlength=13)
    for method in METHODS.values():
        if depth <= method.max_depth:
            found = method.solve(histogram, depth)
            assert found.bound <= optimum <= found.row_count


@cache
def fewest_rows(lengths, row_length, depth):
    """The optimum by trying everything: which others share the row of the longest sequence."""
    if not lengths:
        return 0
    *others, longest = lengths
    choices = [()]
    for number in range(1, depth):
        choices += [chosen for chosen in set(combinations_of(tuple(others), number))
                    if longest + sum(chosen) <= row_length]
    return 1 + min(fewest_rows(without(others, chosen), row_length, depth) for chosen in choices)


def combinations_of(lengths, number):
    return [chosen for chosen in combinations_with_replacement(sorted(set(lengths)), number)
            if all(chosen.count(length) <= lengths.count(length) for length in chosen)]


def without(lengths, removed):
    left = list(lengths)
    for length in removed:
        left.remove(length)
    return tuple(left)


@given(values=st.lists(st.integers(0, 50), min_size=1, max_size=12), depth=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_knapsack_finds_the_most_valuable_row(values, depth):
    values = np.array([0, *values])
    best, choices = knapsack(values, depth)
    rows = [row for number in range(depth + 1)
            for row in combinations_with_replacement(range(1, len(values)), number)]
    for room in range(len(values)):
        assert best[room] == max(sum(values[list(row)]) for row in rows if sum(row) <= room)
    room, value = len(values) - 1, 0
    for choice in reversed(choices):
        value += values[choice[room]]
        room -= choice[room]
    assert value == best[-1]


def test_cutting_stock_ends_where_new_strategies_bring_no_progress():
    histogram = np.zeros(201, np.int64)
    histogram[[35, 47, 67, 125]] = 2, 5, 5, 6  # dropping strategies after such a round once went round in circles
    recipe = METHODS["cutting_stock"].solve(histogram, 4)
    check(recipe, histogram, 4)
    assert recipe.row_count == recipe.bound == 8


@pytest.mark.parametrize(("depth", "seed"), [(1, 0), (2, 1), (3, 2), (3, 3)])
def test_nnls_reaches_the_objective_of_scipy(depth, seed):
    histogram = np.append(0, (np.random.default_rng(seed).random(33)**3 * 1000).astype(np.int64))
    weights = nnls.published_weights(33)
    assert weights.tolist() == [0.09] * 9 + [1.0] * 25
    strategies = nnls.full_strategies(33, depth)
    matrix = nnls.weighted_counts(strategies, weights).toarray()
    counts, distance = scipy.optimize.nnls(matrix, weights * histogram)
    ours = nnls.nearest_counts(strategies, histogram, weights)
    assert ours.min() >= 0
    assert np.linalg.norm(matrix @ ours - weights * histogram) == pytest.approx(distance, rel=1e-6)
    assert matrix @ ours == pytest.approx(matrix @ counts, abs=1e-2)


def test_full_strategies_are_all_ways_to_fill_a_row():
    expected = {(*row, *[0] * (3 - len(row))) for number in (1, 2, 3)
                for row in combinations_with_replacement(range(40, 0, -1), number) if sum(row) == 40}
    found = [tuple(strategy) for strategy in nnls.full_strategies(40, 3).tolist()]
    assert len(found) == len(set(found)) and set(found) == expected


@pytest.mark.parametrize(("method", "depth", "efficiency", "rows_above_bound"), [
    ("cutting_stock", 3, 0.9988, 10), ("cutting_stock", 4, 0.9998, 10), ("nnls", 3, 0.9975, None),
    ("lpfhp", 3, 0.8948, None), ("lpfhp", 8, 0.9910, None), ("lpfhp", 16, 0.9993, None)])
def test_wikipedia_packs_as_well_as_published_or_better(method, depth, efficiency, rows_above_bound):
    histogram = wikipedia_histogram()
    recipe = METHODS[method].solve(histogram, depth)
    check(recipe, histogram, depth)
    assert histogram @ np.arange(513) / 512 / recipe.row_count >= efficiency
    if rows_above_bound is not None:
        assert recipe.row_count - recipe.bound <= rows_above_bound


@pytest.mark.parametrize("module", ["masking", "packing.recipe", "packing.lpfhp", "packing.nnls", "packing.assignment"])
def test_worked_examples_in_docstrings_are_true(module):
    failed, attempted = doctest.testmod(import_module(f"data.{module}"))
    assert attempted and not failed


# --- assignment ---

@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_shuffled_is_a_permutation_of_any_size(size, seed):
    places = shuffled(np.arange(size), size, np.random.SeedSequence(seed))
    assert (np.sort(places) == np.arange(size)).all()


def test_shuffled_takes_a_size_for_each_index():
    seed = np.random.SeedSequence(1)
    indices = np.concatenate([np.arange(5), np.arange(1000)])
    both = shuffled(indices, np.repeat([5, 1000], [5, 1000]), seed)
    assert (both[:5] == shuffled(np.arange(5), 5, seed)).all()
    assert (both[5:] == shuffled(np.arange(1000), 1000, seed)).all()


def test_shuffled_leaves_no_order():
    places = shuffled(np.arange(100_000), 100_000, np.random.SeedSequence(42))
    other = shuffled(np.arange(100_000), 100_000, np.random.SeedSequence(43))
    assert abs(np.corrcoef(np.arange(100_000), places)[0, 1]) < 0.02
    assert abs(np.corrcoef(places[:-1], places[1:])[0, 1]) < 0.02
    assert (places == other).sum() < 20
    tenths = np.bincount(places[:10_000] // 10_000, minlength=10)  # where the first tenth went
    assert tenths.min() > 850 and tenths.max() < 1150


@given(histogram=histograms(most_sequences=40), depth=st.integers(1, 6), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_assignment_gives_every_slot_of_every_row_to_one_sequence(histogram, depth, seed):
    recipe = METHODS["lpfhp"].solve(histogram, depth)
    assignment = RowAssignment(recipe, histogram, seed)
    lengths = np.repeat(np.arange(len(histogram)), histogram)
    rows, slots = assignment.rows_and_slots(lengths, ranks_within(lengths))
    packed = {}
    for row, slot, length in zip(rows.tolist(), slots.tolist(), lengths.tolist(), strict=True):
        assert slot not in packed.setdefault(row, {})
        packed[row][slot] = length
    strategies = [tuple(row[slot] for slot in range(len(row))) for row in packed.values()]
    assert sorted(packed) == list(range(recipe.row_count))
    assert sorted(strategies) == sorted(recipe.rows.elements())


def test_seed_decides_which_sequences_meet():
    histogram = np.zeros(101, np.int64)
    histogram[50] = 1000
    pairs = []
    for seed in (1, 1, 2):
        assignment = RowAssignment(METHODS["lpfhp"].solve(histogram, 2), histogram, seed)
        rows, _ = assignment.rows_and_slots(np.full(1000, 50), np.arange(1000))
        pairs.append({tuple(pair) for pair in np.argsort(rows, kind="stable").reshape(500, 2).tolist()})
    assert pairs[0] == pairs[1]
    assert len(pairs[0] & pairs[2]) < 10
    assert 200 < np.mean([second - first for first, second in pairs[0]]) < 470  # a third of 1000 where all is random


@pytest.mark.parametrize(("row_length", "depth"), [(8, 3), (9, 1), (20, 4), (24, 2)])
def test_a_strategy_has_its_index_in_the_ordered_list_of_all_series_that_fill_a_row(row_length, depth):
    def filling(left, least, more):
        for first in range(least, left + 1):
            if first == left:
                yield [first]
            elif more > 1:
                yield from ([first, *rest] for rest in filling(left - first, first, more - 1))

    series = list(filling(row_length, 1, depth))
    assert [reference_index(lengths, row_length, depth) for lengths in series] == list(range(len(series)))
    padded = reference_index((row_length - 1,), row_length, depth)
    assert series[padded] == ([1, row_length - 1] if depth > 1 else [row_length])
    assert reference_index((100,) * 5, 512, 16) < reference_index((512,), 512, 16), "deep rows take no time"
