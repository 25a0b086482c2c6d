"""examples/fine_tuning/classify.py runs to its end on any exported model, and refuses what it cannot use."""

import json
import random
import sys

import pytest

from common.errors import UserError
from tests.support import ranks, saved_model

sys.path.insert(0, str(ranks.ROOT / "examples" / "fine_tuning"))

import classify  # noqa: E402

FLAGS = ["--seeds=2", "--training_examples=10", "--test_examples=6", "--epochs=1", "--disable_progress_bar"]


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """An exported model, and text shards of sentences."""
    monkeypatch.chdir(tmp_path)
    saved_model.write(tmp_path)
    saved_model.export()
    (tmp_path / "text").mkdir()
    rng = random.Random(1)
    for split in ("training", "test"):
        lines = [" ".join(rng.choices(["the", "sea", "deep", "old"], k=rng.randint(6, 12))) for _ in range(40)]
        (tmp_path / f"text/x_{split}_0.txt").write_text("\n".join(lines))
    return tmp_path


def run(model="out", text="text", *more) -> None:
    classify.main([f"--model={model}", f"--text_dir={text}", *FLAGS, *more])


def test_both_models_are_fine_tuned_for_every_seed(workspace, capsys):
    run("out", "text", "--json")
    scores = json.loads(capsys.readouterr().out)
    assert set(scores) == {"pre-trained", "untrained"}
    assert all(len(values) == 2 and all(0 <= value <= 1 for value in values) for values in scores.values())


def test_table_shows_mean_spread_and_margin():
    lines = classify.table({"pre-trained": [0.7, 0.8], "untrained": [0.6, 0.5]}).splitlines()
    assert lines[1].split() == ["pre-trained", "70.0%", "80.0%", "75.0%", "±", "5.0%"]
    assert lines[-1] == "margin of pre-training: +20.0% (least +10.0%)"


def test_half_of_the_sentences_have_their_share_of_words_replaced():
    args = classify.parse_arguments(["--model=m", "--text_dir=t", "--replaced=0.5"])
    lines = [f"{number} b c d e f g h i j" for number in range(20)]
    for text, label in classify.examples(lines, 20, ["WORD"], args, seed=3):
        assert text.split().count("WORD") == (5 if label else 0)


@pytest.mark.parametrize("model, text, said", [("nowhere", "text", "--model nowhere: no folder with a config.json"),
                                               ("out", "out", "--text_dir out: no text shard")])
def test_what_is_missing_is_named(workspace, model, text, said):
    with pytest.raises(UserError, match=said):
        run(model, text)


def test_too_few_sentences_are_refused(workspace):
    with pytest.raises(UserError, match="sentences to choose 200 from"):
        run("out", "text", "--training_examples=200")
