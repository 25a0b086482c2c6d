"""Sentences into WordPiece ids, as one flat array and the offset of each sentence.

`tokenizers` is the reference.  nanotoken gives the same ids some fifty times faster; it is young, so every encoder that
uses it is checked against the reference, on a page of odd text when it is built and on a sample of the sentences that
it is given, and dropped at the first difference.
"""

import warnings

import numpy as np
from tokenizers import Tokenizer, models

from data.vocabulary import text_steps

CHECK_EVERY = 200  # sentences: one in so many is also encoded by the reference
LONGEST_WORD = 100  # characters; longer words are [UNK], as in BERT's tokenizer
PROBE = (
    "The quick (brown) fox can't jump 32.3 feet, right? naïve café Ångström İstanbul ǅ ﬁ ß",
    "Ελληνικά Русский עברית العربية हिन्दी ไทย 한국어 日本語 中文字符 𠀀𪛟 ｆｕｌｌ ①②",
    "👩‍👩‍👧 🇫🇷 ☕️ é e\u0301 a\u0300\u0316 \u200b\u200d\ufeff\u00ad tab\there \x00\x07\x7f\x85 \ufffd\u2028\u3000",
    "[CLS] [MASK] [SEP] ##ing " + "x" * 99 + " " + "y" * 100 + " " + "z" * 101,
)


def reference_tokenizer(tokens: list[str], lower_case: bool) -> Tokenizer:
    """BERT's tokenizer without its special tokens: "[SEP]" in a text is three tokens, never the separator."""
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = text_steps(lower_case)
    return tokenizer


class Encoder:
    """Encodes lists of sentences.  `choice` says by what, and why where that is the slow one."""

    def __init__(self, tokens: list[str], lower_case: bool, fast: bool = True):
        self.reference = reference_tokenizer(tokens, lower_case)
        self.fast, self.choice = None, "tokenizers"
        if fast:
            self.fast, self.choice = fast_tokenizer(self.reference)

    def encode(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets): sentence i is ids[offsets[i]:offsets[i + 1]]."""
        if self.fast:
            ids, offsets = encode_fast(self.fast, sentences)
            sample = sentences[::CHECK_EVERY]
            expected, _ = encode_reference(self.reference, sample)
            found = [ids[offsets[i]:offsets[i + 1]] for i in range(0, len(sentences), CHECK_EVERY)]
            if np.array_equal(expected, np.concatenate(found) if found else expected):
                return ids, offsets
            self.fast, self.choice = None, "tokenizers (nanotoken gave other ids on this text)"
            warnings.warn(self.choice, stacklevel=2)
        return encode_reference(self.reference, sentences)


def fast_tokenizer(reference: Tokenizer) -> tuple:
    """(nanotoken's tokenizer, "nanotoken"), or (None, the reason why it is not used)."""
    try:
        import nanotoken
    except ImportError:
        return None, "tokenizers (nanotoken is not installed)"
    fast = nanotoken.Tokenizer(reference)
    if not np.array_equal(encode_fast(fast, PROBE)[0], encode_reference(reference, PROBE)[0]):
        return None, "tokenizers (nanotoken gives other ids with this vocabulary)"
    return fast, "nanotoken"


def encode_fast(tokenizer, sentences) -> tuple[np.ndarray, np.ndarray]:
    ragged = tokenizer.encode_batch(sentences, add_special_tokens=False, parallel=False)
    return ragged.ids.astype(np.int32), ragged.offsets


def encode_reference(tokenizer: Tokenizer, sentences) -> tuple[np.ndarray, np.ndarray]:
    encodings = [tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in sentences]
    offsets = np.zeros(len(encodings) + 1, np.int64)
    np.cumsum([len(ids) for ids in encodings], out=offsets[1:])
    return np.array([number for ids in encodings for number in ids], np.int32), offsets
