"""Short versions of tools/torture.py and tools/fuzz.py, which see what no test has thought of."""

import json

import pytest

from tools import fuzz, torture

KILLS = 2


@pytest.mark.slow
@pytest.mark.parametrize("object_storage", [False, True])
def test_trainings_killed_at_random_moments_are_those_that_were_not(tmp_path, object_storage, capsys):
    torture.main([f"--kills={KILLS}", "--seed=3", "--json", *["--object_storage"] * object_storage])
    tally = json.loads(capsys.readouterr().out)
    assert tally["kills"] == KILLS and not tally["problems"]
    assert not any(tally[count] for count in ("mismatches", "checkpoints_lost", "uploads_left"))
    assert tally["steps_compared"] >= sum(torture.STEPS.values())


@pytest.mark.slow
def test_malformed_inputs_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tallies = fuzz.fuzz(tmp_path, 400, seed=7)
    assert {name: tally.failures for name, tally in tallies.items()} == {name: [] for name in tallies}
    assert sum(tally.refused for tally in tallies.values()) >= 400
