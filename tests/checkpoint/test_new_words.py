"""Claims about the rows of words that a model did not have: each begins as the mean of its pieces."""

import pytest
import torch
from torch.testing import assert_close

from checkpoint.huggingface import BIAS, DECODER, NEVER_PREDICTED, WORDS
from checkpoint.new_words import new_word_pieces, with_new_words
from data.preparation.extended_vocabulary import extend
from data.tokenizer import SPECIAL_TOKENS
from modeling import BertForPreTraining
from tests.support import samples

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
