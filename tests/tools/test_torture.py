"""Short versions of tools/torture.py and tools/fuzz.py, which see what no test has thought of."""

import argparse

import pytest

from tools import fuzz, torture


@pytest.mark.slow
def test_trainings_killed_at_random_moments_are_those_that_were_not(tmp_path):
    tally = torture.Torturer(tmp_path, argparse.Namespace(kills=2, signal="SIGKILL", ranks=1, seed=3)).run()
    assert (tally.kills, tally.mismatches, tally.checkpoints_lost, tally.problems) == (2, 0, 0, [])
    assert tally.steps_compared >= sum(torture.STEPS.values())


@pytest.mark.slow
def test_malformed_inputs_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tallies = fuzz.fuzz(tmp_path, 400, seed=7)
    assert {name: tally.failures for name, tally in tallies.items()} == {name: [] for name in tallies}
    assert sum(tally.refused for tally in tallies.values()) >= 400
