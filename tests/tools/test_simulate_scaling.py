"""tools/simulate_scaling.py against figures worked out by hand."""

import json
from types import SimpleNamespace

import pytest

from tools import simulate_scaling
from tools.simulate_scaling import LATENCY, PHASES, all_reduce_seconds, bucket_sizes, exposed, simulate, tensor_sizes

CARDS = [8, 32, 256, 1024]


def test_all_reduce_by_hand(monkeypatch):
    monkeypatch.setattr(simulate_scaling, "INSIDE", 10.0)
    inside = 2 * 7 / 8 * 80 / 10 + 14 * LATENCY
    assert all_reduce_seconds(80, 8, outside=5.0) == pytest.approx(inside)
    assert all_reduce_seconds(80, 32, outside=5.0) == pytest.approx(inside + 2 * 3 / 4 * 10 / 5 + 6 * LATENCY)


def test_buckets_that_set_off_early_hide_behind_the_backward_pass():
    assert exposed([1, 1], [0.25, 0.5], backward=2.0) == pytest.approx(0.5)  # the last one alone is seen
    assert exposed([1, 1], [2.0, 2.0], backward=2.0) == pytest.approx(3.0)
    assert exposed([3, 1], [1.0, 1.0], backward=4.0) == pytest.approx(1.0)


def test_buckets_are_those_of_the_training():
    sizes = tensor_sizes("bert_config.json")
    assert [weight for bucket in bucket_sizes(sizes) for weight in bucket] == sizes
    assert len(bucket_sizes(sizes)) == 6


@pytest.mark.parametrize("links", ["card", "host"])
@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_parts_add_up_and_more_cards_are_faster_but_never_perfect(phase, links):
    figures = simulate(phase, SimpleNamespace(cards=CARDS, links=links, reduction="flat_16_bits"))
    steps = [figures["steps"][cards] for cards in CARDS]
    for cards, step in zip(CARDS, steps, strict=True):
        assert step["step"] == pytest.approx(sum(step[part] for part in ("compute", "all_reduce", "weights",
                                                                         "optimizer")))
        assert step["sequences_per_card"] * cards == phase.batch
    assert [step["step"] for step in steps] == sorted((step["step"] for step in steps), reverse=True)
    assert steps[0]["efficiency"] == pytest.approx(1.0)
    assert all(step["efficiency"] < 1.0 for step in steps[1:])


def test_the_command_prints_json_and_refuses_half_a_server(capsys):
    simulate_scaling.main(["--json", "--cards", "8"])
    assert set(json.loads(capsys.readouterr().out)) == {phase.name for phase in PHASES}
    with pytest.raises(ValueError, match="--cards 12 does not fill servers of 8"):
        simulate_scaling.main(["--cards", "12"])
