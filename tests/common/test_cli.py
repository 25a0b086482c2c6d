"""Bytes and durations as text; slips in typed commands."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.cli import BOOLEAN, ArgumentParser, format_bytes, format_duration, free_text, positive_int, whole
from common.errors import UserError
from common.files import cache_folder
from data.preparation.layout import working_folder
from training.arguments import parse_arguments

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
    return subprocess.run(["bash", "-c", f"{shlex.quote(sys.executable)} run_pretraining.py {words}"], cwd=ROOT,
                          text=True, capture_output=True)


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


def small_parser(*positional: str) -> ArgumentParser:
    parser = ArgumentParser()
    for name in positional:
        parser.add_argument(name, nargs="*")
    parser.add_argument("--max_steps", type=positive_int)
    parser.add_argument("--max_seq_length", type=positive_int)
    parser.add_argument("--resume_step", type=whole)
    parser.add_argument("--do_lower_case", **BOOLEAN, default=True)
    return parser


@pytest.mark.parametrize("text, number", [("7038", 7038), ("7038.0", 7038), ("1e4", 10_000), ("-1.0", -1), ("0.0", 0)])
def test_whole_numbers_may_be_written_as_floats(text, number):
    assert small_parser().parse_args([f"--resume_step={text}"]).resume_step == number
    if number > 0:
        assert small_parser().parse_args([f"--max_steps={text}"]).max_steps == number


@pytest.mark.parametrize("text", ["1.5", "7038.01", "nan", "inf", "1e999", "", "7 038", "one"])
@pytest.mark.parametrize("flag", ["--max_steps", "--resume_step"])
def test_other_numbers_are_not_rounded(flag, text, capsys):
    with pytest.raises(SystemExit):
        small_parser().parse_args([f"{flag}={text}"])
    assert f"{text!r} is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("words, lower_case, sentences", [
    ("--do_lower_case", True, []), ("--do-lower-case --max_steps 3", True, []), ("--do_lower_case False", False, []),
    ("--do_lower_case 0 [MASK]", False, ["[MASK]"]), ("--do_lower_case=no [MASK]", False, ["[MASK]"]),
    ("--do_lower_case [MASK] sat", True, ["[MASK]", "sat"]), ("[MASK] --do_lower_case", True, ["[MASK]"])])
def test_a_boolean_flag_may_stand_bare_also_before_a_sentence(words, lower_case, sentences):
    args = small_parser("sentences").parse_args(words.split())
    assert (args.do_lower_case, args.sentences) == (lower_case, sentences)


@pytest.mark.parametrize("word, closest", [
    ("--max_step=5", "--max_steps"), ("--max-sequence-length=5", "--max_seq_length"), ("--warmup", None),
    ("--do_lowercase", "--do_lower_case"), ("--resume", "--resume_step")])
def test_an_unknown_flag_is_one_line_with_the_closest_known_one(word, closest, capsys):
    with pytest.raises(SystemExit) as caught:
        small_parser().parse_args(["--max_steps=3", word])
    line = capsys.readouterr().err
    assert caught.value.code == 2 and len(line.splitlines()) == 1
    assert f"unrecognized arguments: {word.partition('=')[0].replace('-', '_').replace('__', '--', 1)}" in line
    assert line.count("did you mean") == (closest is not None) and (closest is None or f"mean {closest}?" in line)


def test_an_empty_value_is_no_slip():
    done = in_a_shell("--hmp_bf16= --hmp_fp32='' --config_file '' --output_dir=o --do_train")
    assert "the following arguments are required: --input_dir" in done.stderr


@pytest.mark.parametrize("words, message", [
    ("--config_file s3://b/c.json", "--config_file s3://b/c.json: this flag takes a path of this machine, and no URL"),
    ("--tensorboard_logdir=s3://b/t", "--tensorboard_logdir s3://b/t: this flag takes a path"),
    ("--hmp_bf16=https://h/ops.txt", "--hmp_bf16 https://h/ops.txt: this flag takes a path"),
    ("--input_dir gs://b/d", "--input_dir gs://b/d: this flag takes a path of this machine or only s3:// and http://"),
    ("--input_dir own=o:1 wiki=gs://b/d:1", "--input_dir wiki=gs://b/d:1: this flag takes a path"),
    ("--output_dir https://h/out", "--output_dir https://h/out: this flag takes a path of this machine"),
])
def test_a_url_is_refused_where_a_flag_takes_a_path(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(["--do_train", "--input_dir=d", "--output_dir=o", *words.split()])
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_text_that_looks_like_a_url_is_no_path():
    parser = ArgumentParser()
    parser.add_argument("sentences", nargs="*", type=free_text)
    assert parser.parse_args(["https://example.org is a [MASK] ."]).sentences == ["https://example.org is a [MASK] ."]


@pytest.mark.parametrize("name, function", [("BERT_CACHE_DIR", cache_folder),
                                            ("BERT_PREP_WORKING_DIR", working_folder)])
def test_a_variable_that_names_a_folder_takes_no_url(name, function, monkeypatch):
    monkeypatch.setenv(name, "s3://bucket/data")
    with pytest.raises(UserError, match=f"{name}=s3://bucket/data: this must be a folder of this machine"):
        function()
