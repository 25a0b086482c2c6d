"""Claims about vocabularies and token ids: they are those of transformers' BertTokenizer, by whatever library."""

import os
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from common.errors import UserError
from data import tokenizer
from data.tokenizer import PROBE, SPECIAL_TOKENS, WordPieceEncoder, load_vocabulary, train_vocabulary
from tests.support.preparation import ROOT, SAMPLE, sentences, text_shards, write_vocabulary

ODD = [
    *PROBE[:-1],
    "Ὀδυσσεύς ἄνδρα μοι ἔννεπε; Čeština, íslenska, Việt Nam, Türkçe, ŁÓDŹ, Æsop, œuvre, ﬃ, Ⅻ, ½",
    "प्रकृति, தமிழ், ಕನ್ನಡ, ქართული, አማርኛ, ខ្មែរ, ᏣᎳᎩ, ພາສາລາວ, ދިވެހި",
    "漢字かな交じり文、「引用」。한글과 漢字 〇一二三 ㈱ ㌔ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𒀭",
    "a\u0301e\u0308 n\u0303 ｶﾞ か\u3099 \u0130stanbul ı I\u0307 ẞ ﬀ \u1e9e \u212b \u2126",
    "\u00a0\u1680\u2003\u202f\u205f\u3000spaces\u0085next\u2028line\u2029end \u200e\u200f\u202a\u2060 zero",
    "\x01\x02\x1b[0m control \x7f\x80\x9f \ufffe \uffff \U0010ffff private \ue000",
    "👍🏽 👩🏾‍🚀 🏳️‍🌈 1️⃣ ❤️ ☎︎ 🇩🇪🇯🇵 ©®™ ←↑→ ∑∫√≈ €£¥₿ “quotes” ‘single’ – — … † ‡ § ¶ • ′ ″",
    "don't won't it's o'clock rock'n'roll e-mail x_y a+b=c #tag @name http://example.org/a?b=c&d#e 3.14 1,000 50%",
    "", " ", "\t\n", "a" * 100, "b" * 101, "[UNK", "UNK]",
]


@pytest.fixture(scope="module")
def tokens(sample):
    return load_vocabulary(sample / "vocab" / SAMPLE / "vocab.txt")


def reference(tokens, lower_case: bool):
    """transformers' BertTokenizer as encode(texts) -> ids of each."""
    tokenizer = BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}, do_lower_case=lower_case)
    return lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]


def rows(encoded) -> list[list[int]]:
    ids, offsets = encoded
    return [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize("fast", [True, False], ids=["nanotoken", "tokenizers"])
def test_tokens_of_every_sentence_of_the_sample_are_berttokenizers(sample, tokens, fast):
    lines = [line for path in text_shards(sample) for line in path.read_text().split("\n") if line]
    lines = lines if fast else lines[::20]
    encoder = WordPieceEncoder(tokens, True, fast)
    assert encoder.description.split()[0] == ("nanotoken" if fast else "tokenizers")
    assert rows(encoder.encode(lines)) == reference(tokens, True)(lines)


@pytest.mark.parametrize("fast", [True, False], ids=["nanotoken", "tokenizers"])
@pytest.mark.parametrize("lower_case", [True, False])
def test_tokens_of_odd_text_are_berttokenizers(tokens, fast, lower_case):
    vocab = [*tokens, *sorted({character for line in ODD for character in line if character > "\x80"} - set(tokens))]
    assert rows(WordPieceEncoder(vocab, lower_case, fast).encode(ODD)) == reference(vocab, lower_case)(ODD)


@given(st.lists(st.text(max_size=30), max_size=5))
@settings(max_examples=300, deadline=None)
def test_nanotoken_gives_the_ids_of_tokenizers(texts):
    tokens = [*SPECIAL_TOKENS, *"abcdeé漢", *(f"##{letter}" for letter in "abcde")]
    fast, slow = WordPieceEncoder(tokens, True), WordPieceEncoder(tokens, True, fast=False)
    assert rows(fast.encode(texts)) == rows(slow.encode(texts))


def test_special_tokens_in_a_text_are_ordinary_text(tokens):
    encoded, = rows(WordPieceEncoder(tokens, True).encode(["the [SEP] and [MASK]"]))
    assert not set(encoded) & {tokens.index("[SEP]"), tokens.index("[MASK]"), tokens.index("[UNK]")}


def test_an_encoder_whose_fast_library_errs_goes_on_with_the_reference(tokens):
    encoder = WordPieceEncoder(tokens, True)
    encoder.fast = WordPieceEncoder(tokens[::-1], True).fast  # other ids, as a faulty library would give
    with pytest.warns(UserWarning, match="gave other ids"):
        wrong = rows(encoder.encode(["the sea"]))
    assert wrong == rows(WordPieceEncoder(tokens, True, fast=False).encode(["the sea"])) and encoder.fast is None


def test_training_gives_the_same_vocabulary_in_every_process(tmp_path):
    (tmp_path / "x_training_0.txt").write_text("\n".join(sentences(300)) + "\nÉtude 漢字\n")
    script = ("from data import tokenizer; import sys; "
              "tokenizer.save_vocabulary(sys.argv[2], tokenizer.train_vocabulary([sys.argv[1]], 70, True))")
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", script, tmp_path / "x_training_0.txt", tmp_path / name], cwd=ROOT,
                       env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    first = (tmp_path / "one").read_text().split("\n")
    assert first == (tmp_path / "two").read_text().split("\n")
    assert first[:5] == list(SPECIAL_TOKENS) and len(first) == 71
    assert "e" in first and "漢" in first and "É" not in first


LANGUAGES = {
    "bg": "Щърбатият Йордан каза: „Ще дойда след 5 ч.“, но ѝ писа по-късно. Ъгълът е остър; жълтият цвят избледнява.",
    "zh": "北京大學成立於1898年，是中國第一所國立綜合性大學。他說：「你好！」𠮷野家在哪里？",
    "ar": "الإسكندرية مدينةٌ كبيرةٌ، تأسّست سنة ٣٣١ ق.م.؛ هل زرتَها؟ نعم، ذهبتُ إلى هناك مرّتين.",
    "hi": "क्षत्रिय राजा ने कहा: “यह हिन्दी में लिखा है।” ज़िन्दगी १९४७ में बदल गई, है ना?",
    "th": "กรุงเทพมหานคร เป็น เมืองหลวง ของ ประเทศไทย ผู้คนที่นี่ ชอบ กินข้าวเหนียวมะม่วง ๒๕๖๗",
    "de": "Straßenbahn-Übergänge, z. B. in Köln, heißen „Bahnsteige“; ÄÖÜ äöü ẞ ß: Fußgängerübergang für 3,50 €.",
}


@pytest.mark.parametrize("lower_case", [True, False], ids=["uncased", "cased"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_tokens_of_a_trained_vocabulary_are_berttokenizers_in_every_script(tmp_path, language, lower_case):
    path, text = tmp_path / "x_training_0.txt", LANGUAGES[language]
    path.write_text((text + "\n") * 3 + "\n".join(text.split()), encoding="utf-8")
    tokens = train_vocabulary([path], 250, lower_case, unused_tokens=7)
    assert tokens[5:12] == [f"[unused{number}]" for number in range(7)] and len(tokens) <= 250
    texts = [text, text.upper(), *LANGUAGES.values(), unicodedata.normalize("NFD", text), "[unused3]"]
    encoded = rows(WordPieceEncoder(tokens, lower_case).encode(texts))
    assert encoded == reference(tokens, lower_case)(texts)
    assert tokens.index("[UNK]") not in encoded[0] and not set(range(5, 12)) & set(sum(encoded, []))


def test_a_vocabulary_is_trained_on_all_parts_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", 4000)
    monkeypatch.setattr(tokenizer, "SAMPLED_BYTES", 200)
    path = tmp_path / "x_training_0.txt"
    path.write_text("".join(f"{word} sea\n" * 300 for word in ("harbour", "compass", "whistle")))
    (tmp_path / "y_training_1.txt").write_text("lantern sea\n" * 300)
    assert sum(map(len, tokenizer.sample_lines([path], 4000))) < 6000
    trained = train_vocabulary([path, tmp_path / "y_training_1.txt"], 90, True)
    assert {"harbour", "compass", "whistle", "lantern", "sea"} <= set(trained)


def test_an_alphabet_of_thousands_of_characters_is_in_the_vocabulary(tmp_path):
    path = tmp_path / "x_training_0.txt"
    signs = [chr(0x4E00 + number) for number in range(3000)]
    path.write_text("".join("".join(signs[start:start + 30]) + "。\n" for start in range(0, 3000, 30)))
    assert len(set(signs) - set(train_vocabulary([path], 8000, True))) <= 0.001 * len(signs)
    assert len(train_vocabulary([path], 2100, True)) <= 2100
    with pytest.raises(UserError, match="--vocab_size 900: .* --unused_tokens 9 and the characters .* need 1014"):
        train_vocabulary([path], 900, True, 9)


@pytest.mark.parametrize("spoil, message", [
    (lambda text: text.replace("[MASK]\n", ""), r"no \[MASK\] among its"),
    (lambda text: text + "sea\n", "tokens are in it twice, the first is 'sea'"),
    (lambda text: "", "no .PAD., "),
])
def test_a_spoilt_vocabulary_is_refused(tmp_path, spoil, message):
    path = write_vocabulary(tmp_path / "vocab.txt")
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=message):
        load_vocabulary(path)


def test_a_vocabulary_of_other_line_ends_or_missing_is_read_or_named(tmp_path):
    path = write_vocabulary(tmp_path / "vocab.txt")
    tokens = load_vocabulary(path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_vocabulary(path) == tokens
    path.write_bytes(b"\xff\xfa")
    with pytest.raises(UserError, match="vocab.txt: cannot be read"):
        load_vocabulary(path)
    with pytest.raises(UserError, match="nowhere.txt: cannot be read"):
        load_vocabulary(tmp_path / "nowhere.txt")


def test_a_hugging_face_folder_and_its_tokenizer_file_are_a_vocabulary(tmp_path, tokens):
    BertTokenizer(vocab={token: number for number, token in enumerate(tokens)}).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists(), "transformers 5"
    assert load_vocabulary(tmp_path) == load_vocabulary(tmp_path / "tokenizer.json") == tokens
    for content, said in (("{", "not the tokenizer.json of a BERT"), ('{"model": {"vocab": ["a"]}}', "not the tok"),
                          ('{"model": {"vocab": {"a": 0, "b": 2}}}', "its 2 tokens are not numbered from 0")):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=f"tokenizer.json: {said}"):
            load_vocabulary(tmp_path)
    write_vocabulary(tmp_path / "vocab.txt")
    assert load_vocabulary(tmp_path)[:5] == list(SPECIAL_TOKENS)


def test_a_vocabulary_with_a_past_keeps_every_id(tmp_path):
    """A byte order mark, blank lines that hold their places, and a line separator within a token."""
    words = ["sea", "", "deep", " ", "blue\u2028sky", "salt"]
    path = tmp_path / "vocab.txt"
    path.write_bytes(("\ufeff" + "".join(f"{word}\r\n" for word in [*SPECIAL_TOKENS, *words])).encode())
    tokens = load_vocabulary(path)
    assert tokens[:5] == list(SPECIAL_TOKENS) and len(tokens) == 11
    ids, _ = WordPieceEncoder(tokens, True).encode(["deep salt sea blue [blank line 7]"])
    assert ids.tolist()[:3] == [7, 10, 5] and not {6, 8, 9} & set(ids.tolist())


def test_encoding_nothing_gives_nothing(tokens):
    ids, offsets = WordPieceEncoder(tokens, True).encode([])
    assert len(ids) == 0 and np.array_equal(offsets, [0])
