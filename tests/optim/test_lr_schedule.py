"""The learning rate against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.lr_schedule import SCHEDULES, learning_rate
from tools import draw_schedules


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


@pytest.mark.parametrize("schedule, expected", [
    ("poly", [0.5, 0.75**0.5, 0.5**0.5, 0.0]),
    ("linear", [0.5, 1.0, 2 / 3, 0.0]),
    ("cosine", [0.5, 1.0, 0.75, 0.0]),
    ("constant", [0.5, 1.0, 1.0, 1.0]),
    ("wsd", [0.5, 1.0, 1.0, 0.0]),
])
def test_each_schedule_after_a_quarter_of_warm_up(schedule, expected):
    rates = [learning_rate(step, 1.0, 0.25, 8, schedule) for step in (1, 2, 4, 8)]
    assert rates == pytest.approx(expected)


def test_wsd_falls_in_the_last_fifth_by_one_minus_the_square_root():
    rates = [learning_rate(step, 1.0, 0.0, 20, "wsd") for step in range(15, 21)]
    assert rates == pytest.approx([1.0, 1.0, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0.0])


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 500), st.floats(0.0, 1.0, allow_subnormal=False))
def test_after_the_warm_up_no_schedule_rises_or_leaves_its_range(schedule, max_steps, warmup):
    rates = [learning_rate(step, 1.0, warmup, max_steps, schedule) for step in range(1, max_steps + 1)]
    assert all(0.0 <= rate <= 1.0 for rate in rates)
    after = [rate for step, rate in enumerate(rates, start=1) if step / max_steps >= warmup]
    assert after == sorted(after, reverse=True)


def test_the_picture_of_the_schedules_can_be_drawn_again(tmp_path):
    draw_schedules.main(["--output", str(tmp_path / "rates.png")])
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
