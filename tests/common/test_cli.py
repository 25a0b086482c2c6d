"""Bytes and durations as text; slips in typed commands."""

import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import format_bytes, format_duration

ROOT = Path(__file__).resolve().parent.parent.parent
FLAGS = "--do_train --config_file=c.json --input_dir=data"


@pytest.mark.parametrize("count, text", [(0, "0 B"), (422_000, "422 kB"), (999_600, "1 MB"), (1_234_567, "1.23 MB"),
                                         (25e9, "25 GB"), (2e15, "2e+03 TB")])
def test_bytes_have_the_unit_that_fits(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize("seconds, text", [(0.0123, "0.0123 s"), (59.7, "1 min 0 s"), (75.2, "1 min 15 s"),
                                           (3599.9, "1 h 0 min"), (93784, "26 h 3 min")])
def test_durations_have_the_units_that_fit(seconds, text):
    assert format_duration(seconds) == text


def in_a_shell(words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", f"{sys.executable} run_pretraining.py {words}"], cwd=ROOT, text=True,
                          capture_output=True)


@pytest.mark.parametrize("words, message", [
    (f"{FLAGS} --output_dir= /tmp/out", "--output_dir= is followed by a space: write --output_dir=/tmp/out"),
    (f"{FLAGS} --output_dir =/tmp/out", "--output_dir is followed by a space: write --output_dir=/tmp/out"),
    (f"{FLAGS} --output_dir = /tmp/out", "--output_dir is followed by a space: write --output_dir=/tmp/out"),
    (f"{FLAGS} --json-summary= /tmp/log.json --output_dir=o", "write --json-summary=/tmp/log.json"),
    (f"--do_train \\ {FLAGS} --output_dir=o", "a backslash with a space behind it stands before --do_train"),
    (f"--do_train \\  {FLAGS} --output_dir=o", "a backslash with a space behind it stands before --do_train"),
    (f"{FLAGS} --output_dir=o \\ \n --seed=3", "a backslash with a space behind it stands at the end"),
])
def test_a_slip_in_a_command_is_one_line_that_says_how_it_should_read(words, message):
    done = in_a_shell(words)
    line = done.stderr.splitlines()[0]
    assert message in line and "error: " in line, done.stderr
    assert "Traceback" not in done.stderr


def test_an_empty_value_is_no_slip():
    done = in_a_shell("--hmp_bf16= --hmp_fp32='' --config_file '' --output_dir=o --do_train")
    assert "the following arguments are required: --input_dir" in done.stderr
