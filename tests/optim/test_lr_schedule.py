"""The learning rate against values worked out by hand."""

import pytest

from optim.lr_schedule import learning_rate


@pytest.mark.parametrize("step, expected", [
    (1, 0.006 * (1 / 7038) / 0.2843),  # 3.0e-6
    (1000, 0.006 * 0.14208582 / 0.2843),
    (2000, 0.006 * 0.28417164 / 0.2843),  # the last step below the warm-up's end at 2000.9
    (2001, 0.006 * 0.84599216),  # √(1 − 2001/7038) = √0.71568627
    (7000, 0.006 * 0.07348005),  # √(38/7038)
    (7038, 0.0),
])
def test_rate_of_phase_one_by_hand(step, expected):
    assert learning_rate(step, 0.006, 0.2843, 7038) == pytest.approx(expected, rel=2e-5, abs=1e-12)


def test_without_warm_up_the_rate_only_falls():
    rates = [learning_rate(step, 1.0, 0.0, 5) for step in range(1, 6)]
    assert rates == pytest.approx([0.8**0.5, 0.6**0.5, 0.4**0.5, 0.2**0.5, 0.0])


def test_with_warm_up_alone_the_last_step_falls_to_zero():
    assert [learning_rate(step, 1.0, 1.0, 4) for step in (1, 2, 3, 4)] == [0.25, 0.5, 0.75, 0.0]
