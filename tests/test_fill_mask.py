"""The words that fill a [MASK]: those of transformers' own pipeline."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

import fill_mask
from checkpoint.huggingface import tokenizer_of
from checkpoint.load import load_model
from checkpoint.trained_model import open_trained_model
from common.errors import UserError
from modeling import BertForPreTraining
from tests.support import saved_model

ROOT = Path(fill_mask.__file__).parent
FLAGS = saved_model.command_line()


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_model.write(tmp_path)


def test_words_and_probabilities_are_those_of_transformers():
    saved_model.export()
    trained = open_trained_model("ckpt_7.pt", "config.json")
    sentence = "The [MASK] seas deep [MASK]."
    model = BertForPreTraining(trained.config).eval()
    load_model(model, trained.contents, trained.path)
    tokenizer = tokenizer_of(trained.full_vocabulary("vocab.txt", True).tokens, True)
    masks = fill_mask.MaskPredictor(model, tokenizer, 1003 - 5, None).answer(sentence)["masks"]
    found = [mask["words"] for mask in masks]
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    masked_lm = saved_model.loaded("BertForMaskedLM", "masked_lm")
    theirs = transformers.pipeline("fill-mask", masked_lm, tokenizer=tokenizer, top_k=1003)
    for ours, expected in zip(found, theirs(sentence), strict=True):
        words = [entry for entry in expected if entry["token"] >= 5]
        share = sum(entry["score"] for entry in words)  # special tokens are no words
        assert len(ours) == 998 and [word for word, _ in ours] == tokenizer.convert_ids_to_tokens(
            [entry["token"] for entry in words])
        assert [value for _, value in ours] == pytest.approx([entry["score"] / share for entry in words], rel=1e-4)


def test_a_sentence_is_answered_with_five_words_for_each_mask(capsys):
    fill_mask.main([*FLAGS, "The [MASK] is [MASK].", "Old [MASK]"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("    ")] == ["The [MASK] is [MASK].", "Old [MASK]"]
    assert [line.count("%)") for line in lines if line.startswith("    ")] == [5, 5, 5]


def test_a_mistyped_sentence_does_not_end_the_conversation(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("no mask\nthe [MASK]\n\n \ndeep [MASK]\n"))
    fill_mask.main(FLAGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["no [MASK] in 'no mask'", "the [MASK]"] and len(lines) == 5
    assert lines[3] == "deep [MASK]", "from a pipe empty lines are passed over"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
def test_bytes_that_are_not_utf8_end_in_one_line(locale):
    done = subprocess.run([sys.executable, ROOT / "fill_mask.py", *FLAGS], input=b"the [MASK]\ncaf\xe9 [MASK]\n",
                          capture_output=True, env={**os.environ, "LC_ALL": locale})
    assert done.returncode == 2 and b"the [MASK]" in done.stdout
    assert done.stderr.decode().splitlines()[-1].endswith("error: standard input: line 2 is not UTF-8")


def test_words_are_utf8_where_the_terminal_knows_ascii_only(capsys):
    sentence = "caf\u00e9 [MASK]".encode()
    done = subprocess.run([sys.executable, ROOT / "fill_mask.py", *FLAGS], input=sentence, capture_output=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"})
    fill_mask.main([*FLAGS, sentence.decode("ascii", "surrogateescape")])  # as the shell's words come there
    assert capsys.readouterr().out.startswith("caf\u00e9 [MASK]\n")
    with pytest.raises(UserError, match="SENTENCE is not UTF-8"):
        fill_mask.main([*FLAGS, b"caf\xe9 [MASK]".decode("ascii", "surrogateescape")])
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[0] == b"caf\\xe9 [MASK]" and done.stdout.count(b"%)") == 5


@pytest.mark.parametrize("size", [fill_mask.LONGEST_LINE - 1, fill_mask.LONGEST_LINE, 3 * fill_mask.LONGEST_LINE])
def test_a_line_that_is_no_sentence_is_passed_over(capsys, monkeypatch, size):
    """The limit counts the line's end, too."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * size + "\nthe [MASK]\n" + "y" * 2 * size))
    fill_mask.main(FLAGS)
    lines = capsys.readouterr().out.splitlines()
    passed_over = "longer than 100000 characters: passed over"
    assert lines[0] == (f"line 1 is {passed_over}" if size >= fill_mask.LONGEST_LINE else f"no [MASK] in {'x' * 80!r}…")
    assert lines[1] == "the [MASK]" and lines[3:] == [f"line 3 is {passed_over}"]


@pytest.mark.parametrize("words, said", [
    ([*FLAGS, "the sea"], "no [MASK] in 'the sea'"),
    ([*FLAGS, "sea " * 40 + "[MASK]"], "43 tokens in 'sea sea"),
    ([*FLAGS, "--vocab_file=short.txt", "[MASK]"], "--vocab_file short.txt: cannot be read"),
])
def test_what_cannot_be_answered_is_said(words, said):
    with pytest.raises(UserError) as error:
        fill_mask.main(words)
    assert said in str(error.value)


def test_the_command_ends_with_one_line():
    done = subprocess.run([sys.executable, ROOT / "fill_mask.py", *FLAGS, "the sea"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
