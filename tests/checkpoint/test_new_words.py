"""Claims about the rows of words that a model did not have: each begins as the mean of its pieces."""

import pytest
import torch
import transformers
from torch.testing import assert_close

from checkpoint.folder import read_checkpoint
from checkpoint.huggingface import BIAS, DECODER, NEVER_PREDICTED, WORDS
from checkpoint.new_words import new_word_pieces, with_new_words
from common.errors import UserError
from data.preparation.extended_vocabulary import extend
from data.preparation.samples import SampleOptions, create_shard
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from modeling import BertForPreTraining
from tests.support import samples
from tests.support.preparation import LETTERS, sentences
from tests.support.small_run import train

OLD = [*SPECIAL_TOKENS, "[unused0]", "sea", "gull", "##bed", "##s", "x", "[unused1]", "y"]  # 13


def contents_of(model) -> dict:
    return {"model": model.state_dict(), "config": vars(model.config), "optimizer": {"param_groups": []}}


@pytest.mark.parametrize("lines", [["Seabed"], ["seabed", "gulls"], ["seabed", "gulls", "seabeds", "Möwe", "seas"]])
@pytest.mark.parametrize("room", [0, 9])
def test_the_rows_of_new_words_are_the_means_of_their_pieces_and_no_other_row_changes(lines, room):
    """`room`: entries of the model beyond its vocabulary, as published ones have."""
    torch.manual_seed(0)
    model = BertForPreTraining(samples.config(vocab_size=len(OLD) + room))
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = extend(OLD, lines, lower_case=True).tokens
    pieces = new_word_pieces(OLD, new, lower_case=True)
    vocab_size = max(len(new), len(OLD) + room)
    grown = with_new_words(contents_of(model), pieces, vocab_size)
    assert grown["config"]["vocab_size"] == vocab_size and "optimizer" not in grown
    ids = {"seabed": [6, 8], "gulls": [7, 9], "seabeds": [6, 8, 9], "mowe": [1], "seas": [6, 9]}
    assert {new[number]: parts for number, parts in pieces.items()} == {
        word: ids[word] for word in map(str.lower, lines) if word in ids} | ({"mowe": [1]} if "Möwe" in lines else {})
    for name in (WORDS, BIAS):
        assert len(grown["model"][name]) == samples.config(vocab_size=vocab_size).padded_vocab_size
        for number, row in enumerate(grown["model"][name]):
            old = before[name]
            expected = old[pieces[number]].mean(0) if number in pieces else old[number] if number < len(OLD) + room \
                else torch.full_like(row, NEVER_PREDICTED if name == BIAS else 0.0)
            assert_close(row, expected)
    assert grown["model"][f"{DECODER}.weight"] is grown["model"][WORDS]
    assert all(torch.equal(grown["model"][name], value) for name, value in before.items()
               if not name.startswith((WORDS, BIAS, DECODER)))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items()), "what was read stays"


def test_a_new_word_is_as_likely_as_its_pieces_are_on_average():
    torch.manual_seed(1)
    model = BertForPreTraining(samples.config(vocab_size=len(OLD))).eval()
    hidden = torch.randn(3, 24)
    before = model.cls.predictions(hidden)
    pieces = new_word_pieces(OLD, extend(OLD, ["seabed"], True).tokens, True)
    grown = with_new_words(contents_of(model), pieces, len(OLD))
    model.load_state_dict(grown["model"])
    after = model.cls.predictions(hidden)
    assert_close(after[:, 5], before[:, [6, 8]].mean(1), atol=1e-5, rtol=1e-5)


WORDS_OF_TEXT = ["the", "sea", "is", "deep", "and", "old", "ships", "sail", "far", "out"]
BASE = [*SPECIAL_TOKENS, "[unused0]", *LETTERS, *(f"##{letter}" for letter in LETTERS), *WORDS_OF_TEXT, "."]  # 68


@pytest.fixture(scope="module")
def domain(tmp_path_factory):
    """A published model with its vocabulary, and data made with two words more, one of them behind it."""
    folder = tmp_path_factory.mktemp("domain")
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**samples.TINY | {"vocab_size": len(BASE)}))
    theirs.save_pretrained(folder / "published")
    save_vocabulary(folder / "published/vocab.txt", BASE)
    (folder / "published/tokenizer_config.json").write_text('{"do_lower_case": true}')
    lines = "\n".join(sentences(80)) + "\n\n" + "\n".join(sentences(80, 1)) + "\n"
    options = SampleOptions(max_seq_length=samples.SEQUENCE_LENGTH, max_predictions_per_seq=samples.PREDICTIONS)
    for name, words in (("data", []), ("more", ["gulls", "cry"]), ("other", ["wind", "over"])):
        (folder / f"{name}_training_0.txt").write_text(lines)
        create_shard(folder / f"{name}_training_0.txt", folder / name / "x_training_0.hdf5",
                     extend(BASE, words, True).tokens, options)
    return folder


def going_on(**changes) -> dict:
    """The flags of a run of one step that hardly changes a weight."""
    return {"config_file": None, "init_checkpoint": "published", "input_dir": "more", "max_steps": 1,
            "learning_rate": 1e-12, "json_summary": "log.json", **changes}


def test_a_run_adds_the_words_of_its_data_to_the_model_that_it_goes_on_from(domain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(domain)
    train(**going_on(output_dir=tmp_path / "out"))
    assert "; 2 new words begin as the means of their pieces" in capsys.readouterr().out
    own, theirs = read_checkpoint(tmp_path / "out/ckpt_1.pt"), read_checkpoint("published")
    assert own["config"]["vocab_size"] == len(BASE) + 1
    for name in (WORDS, BIAS):
        rows, before = own["model"][name], theirs["model"][name]
        for number, word in ((5, "gulls"), (len(BASE), "cry")):
            pieces = [BASE.index(("##" if place else "") + letter) for place, letter in enumerate(word)]
            assert_close(rows[number], before[pieces].mean(0), atol=1e-6, rtol=1e-5)
        kept = [number for number in range(len(BASE)) if number != 5]
        assert_close(rows[kept], before[kept], atol=1e-6, rtol=1e-5)
    train(**going_on(output_dir=tmp_path / "out", max_steps=2, resume_from_checkpoint=True))
    train(**going_on(init_checkpoint=tmp_path / "out/ckpt_1.pt", output_dir=tmp_path / "third",
                     config_file=samples.write_config(tmp_path / "typed.json", vocab_size=len(BASE))))
    assert "new words" not in capsys.readouterr().out, "the model knows them"


def test_the_moments_of_a_checkpoint_are_left_out_and_another_vocabulary_is_refused(domain, tmp_path, monkeypatch,
                                                                                     capsys):
    monkeypatch.chdir(domain)
    train(**going_on(input_dir="data", output_dir=tmp_path / "out"))
    train(**going_on(init_checkpoint=tmp_path / "out/ckpt_1.pt", output_dir=tmp_path / "second",
                     resume_from_checkpoint=True))
    printed = capsys.readouterr()
    assert "the optimizer's moments in it are left out" in printed.err and "2 new words" in printed.out
    with pytest.raises(UserError, match="--input_dir other: its vocabulary has 70 tokens, .*ckpt_1.pt 70"):
        train(**going_on(input_dir="other", init_checkpoint=tmp_path / "second/ckpt_1.pt", output_dir=tmp_path / "no"))
