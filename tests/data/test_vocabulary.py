"""Which vocabularies are the same, which extend another, and which are cased."""

import h5py
import pytest

from common.errors import UserError
from data.origin import Origin
from data.tokenizer import SPECIAL_TOKENS
from data.vocabulary import Vocabulary, check_same_vocabulary, check_size, is_cased

TOKENS = [*SPECIAL_TOKENS, "[unused0]", "[unused1]", "sea", "##s", "old"]
UNUSED_AT_END = [*TOKENS, "[unused2]", "[unused3]"]  # as an export fills a vocabulary up


def of(tokens, lower_case=True, with_tokens=True) -> Vocabulary:
    vocabulary = Vocabulary.of(tokens, lower_case)
    return vocabulary if with_tokens else Vocabulary.from_dict(vocabulary.to_dict() | {"lines": None}, "file")


@pytest.mark.parametrize("other, same, extends", [
    (TOKENS, True, True),
    (UNUSED_AT_END, True, True),
    ([*TOKENS[:5], "ship", *TOKENS[6:]], False, True),
    ([*TOKENS, "ship"], False, True),
    ([*UNUSED_AT_END[:-1], "ship"], False, True),
    ([*TOKENS[:-1], "new"], False, False),
    ([*TOKENS[:-2], "old", "##s"], False, False),
    (TOKENS[:-1], False, False)])
def test_vocabularies_are_the_same_but_for_unused_tokens_at_their_end(other, same, extends):
    one, other = of(TOKENS), of(other)
    assert (one.same_tokens(other), other.same_tokens(one), other.extends(one)) == (same, same, extends)
    for may_extend, fits in ((False, same), (True, extends)):
        if fits:
            check_same_vocabulary(other, "data", one, "model", may_extend)
        else:
            with pytest.raises(UserError, match=f"data: its vocabulary has {other.size} .* that of model {one.size}"):
                check_same_vocabulary(other, "data", one, "model", may_extend)
    without = of(TOKENS, with_tokens=False)
    assert without == one and without.same_tokens(of(UNUSED_AT_END)) and not of(UNUSED_AT_END).extends(without)


@pytest.mark.parametrize("one, other, fits", [(True, True, True), (True, False, False), (False, None, True)])
def test_the_case_must_be_the_same_where_it_is_known(one, other, fits):
    assert of(TOKENS, one).same_case(of(TOKENS, other)) == fits


@pytest.mark.parametrize("tokens, cased", [
    (TOKENS, False), ([*TOKENS, "Sea", "##S"], True), ([*SPECIAL_TOKENS, *"海深舊", *"abcdefghijk"], False),
    ([f"word{number}" for number in range(100)] + ["A", "B"], False), (["море", "Море"], True)])
def test_a_cased_vocabulary_is_known_by_its_capital_letters(tokens, cased):
    assert is_cased(tokens) == cased


@pytest.mark.parametrize("size, fits", [(100, True), (95, True), (94, False), (101, False)])
def test_a_vocabulary_may_leave_five_per_cent_of_the_model_free(size, fits):
    if fits:
        check_size(size, 100, "vocab.txt")
    else:
        with pytest.raises(UserError, match=f"^vocab.txt: {size} tokens, but vocab_size in the config is 100$"):
            check_size(size, 100, "vocab.txt")


@pytest.mark.parametrize("words, sources", [(9, 1), (60_000, 9_000)])
def test_a_shard_carries_any_number_of_tokens_and_sources(tmp_path, words, sources):
    """Also more than an attribute has room for."""
    tokens = [*SPECIAL_TOKENS, *(f"word{number * 7919 % 99991}море" for number in range(words))]
    origin = Origin(Vocabulary.of(tokens, False), tuple(f"{number:016x}" for number in range(sources)))
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        origin.write(file.attrs)
        assert list(file) == []
    assert words > 9 or (tmp_path / "x.hdf5").stat().st_size < 2000
    with h5py.File(tmp_path / "x.hdf5") as file:
        assert Origin.read(file.attrs, "x") == origin
        assert Origin.read(file.attrs, "x", with_lines=True).vocabulary.tokens == tokens
