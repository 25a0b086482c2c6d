"""Bytes and durations as text."""

import pytest

from common.cli import format_bytes, format_duration


@pytest.mark.parametrize("count, text", [(0, "0 B"), (422_000, "422 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB"),
                                         (25e9, "25 GB"), (2e15, "2e+03 TB")])
def test_bytes_have_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("seconds, text", [(0.0123, "0.0123 s"), (59.7, "1 min 0 s"), (75.2, "1 min 15 s"),
                                           (3599.9, "1 h 0 min"), (93784, "26 h 3 min")])
def test_durations_have_the_units_that_fit(seconds, text):
    assert format_duration(seconds) == text
