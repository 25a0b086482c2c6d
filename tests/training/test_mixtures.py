"""Whole runs on a mixture of training sets: shares, figures of each source, resuming, refusals."""

import numpy as np
import pytest

from common.errors import UserError
from data.mixture import Mixture
from tests.support import samples, small_run
from training.data_sets import mixed_counts


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_run.write_workspace(tmp_path)
    samples.write_dataset(tmp_path / "other", (9, 4), seed=70)
    return tmp_path


def train_on(*parts: str, **changes) -> None:
    small_run.run_pretraining.main([*small_run.flags(input_dir=None, **changes), "--input_dir", *parts])


def of_sources(log) -> dict[int, dict]:
    return {line["step"][1]: line["data"]["sources"] for line in samples.log_lines(log)
            if "sources" in line["data"]}


def test_each_source_has_its_share_its_figures_and_its_place_in_a_resumed_run(workspace, capsys):
    mixture = ("large=data:0.75", "small=other:0.25")
    train_on(*mixture, output_dir="whole", json_summary="whole/log.json", max_steps=9)
    whole = of_sources(workspace / "whole/log.json")
    # 2 micro-batches of 4 rows a step, every fourth from the small set: 18 in all
    assert [step for step in whole if "mlm_loss" in whole[step]["small"]] == [2, 4, 6, 8]
    assert all("mlm_loss" in figures["large"] for figures in whole.values())
    assert (whole[9]["large"]["epoch"], whole[9]["small"]["epoch"]) == (2, 1)  # 14 · 4 of 25 rows, 4 · 4 of 13
    output = capsys.readouterr().out
    assert "large: 75.0% of the micro-batches, 25 rows" in output and "small: 25.0%" in output
    losses = samples.losses(workspace / "whole/log.json")
    single = [whole[step]["large"]["mlm_loss"] for step in (3, 5)]  # steps of the large set alone
    assert all(0 < losses[step] - loss < 1.5 for step, loss in zip((3, 5), single, strict=True))  # without NSP's ln 2

    train_on(*mixture, max_steps=9, steps_this_run=4)
    train_on(*reversed(mixture), max_steps=9, resume_from_checkpoint=True)
    assert samples.losses(workspace / "out/log.json") == losses
    for other in (("large=data:0.5", "small=other:0.5"), ("large=data:3", "less=other:1"), ("data",)):
        with pytest.raises(UserError, match="the run began with the mixture .*'large': 3"):
            train_on(*other, max_steps=10, resume_from_checkpoint=True)


def test_sets_of_different_forms_are_refused(workspace):
    samples.write_dataset(workspace / "longer", (9,), sequence_length=32)
    with pytest.raises(UserError, match=r"the shards of a are .* but those of b .*32 tokens.*a mixture is of one form"):
        train_on("a=data:1", "b=longer:1")


def test_token_frequencies_are_those_of_the_shares_whatever_the_sizes_of_the_sets():
    small, large = np.array([6, 2]), np.array([0, 40])
    assert mixed_counts([small, large], Mixture((1, 1))).tolist() == [15, 25]
    assert mixed_counts([small, large], Mixture((3, 1))).sum() == 40
    assert mixed_counts([small], Mixture()).tolist() == [6, 2]
