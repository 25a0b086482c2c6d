"""BERT's WordPiece tokenizer: reads and trains vocabularies, and encodes sentences.  No torch here.

Encoding: `tokenizers` is the reference.  nanotoken gives the same ids about fifty times faster.  It is a young library,
so the encoder compares it with the reference, on unusual text when it is built and on a sample of the sentences later,
and stops using it at the first difference.
"""

import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from common.errors import UserError
from common.files import replacing
from common.text import lines_of_text, open_text

VOCAB_FILE, TOKENIZER = "vocab.txt", "tokenizer.json"  # in a Hugging Face folder
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
USUAL_ALPHABET = 1000  # characters, as in BERT's own vocabulary; more where fewer would leave much of the text out
COVERED = 0.9995  # of the text's characters, by those of the alphabet: Chinese needs thousands
TRAINING_BYTES = 100 << 20  # text that is trained on, spread evenly over all files; bounds the memory
SAMPLED_BYTES = 1 << 16  # of which one piece of that text is
CHECK_EVERY = 200  # every 200th sentence is also encoded by the reference
LONGEST_WORD = 100  # characters; longer words are [UNK], as in BERT's tokenizer
PROBE = (
    "The quick (brown) fox can't jump 32.3 feet, right? naïve café Ångström İstanbul ǅ ﬁ ß",
    "Ελληνικά Русский עברית العربية हिन्दी ไทย 한국어 日本語 中文字符 𠀀𪛟 ｆｕｌｌ ①②",
    "👩‍👩‍👧 🇫🇷 ☕️ é e\u0301 a\u0300\u0316 \u200b\u200d\ufeff\u00ad tab\there \x00\x07\x7f\x85 \ufffd\u2028\u3000",
    "[CLS] [MASK] [SEP] ##ing " + "x" * 99 + " " + "y" * 100 + " " + "z" * 101,
)


def load_vocabulary(path) -> list[str]:
    """The tokens of a vocabulary file, one a line, in the order of their ids.  UserError for a file that is not one.

    A blank line holds its place, under a name that no text has.  A Hugging Face folder, and the tokenizer.json of one,
    are taken too.
    """
    path = vocabulary_path(path)
    try:
        with open_text(path) as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--vocab_file {path}: cannot be read ({error})") from None
    tokens = numbered_tokens(text, path) if path.suffix == ".json" else lines_of_text(text)
    tokens = [token if token.strip() else f"[blank line {number}]" for number, token in enumerate(tokens, start=1)]
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"--vocab_file {path}: no {', '.join(missing)} among its {len(tokens)} tokens")
    if len(tokens) <= len(SPECIAL_TOKENS):
        raise UserError(f"--vocab_file {path}: no words beside the special tokens")
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise UserError(f"--vocab_file {path}: {len(repeated)} tokens are in it twice, the first is {repeated[0]!r}")
    return tokens


def vocabulary_path(path) -> Path:
    """The file of a vocabulary: of a folder vocab.txt or, as transformers 5 writes it alone, tokenizer.json."""
    path = Path(path)
    names = [path / name for name in (VOCAB_FILE, TOKENIZER)] if path.is_dir() else [path]
    return next((name for name in names if name.is_file()), names[0])


def numbered_tokens(text: str, path) -> list[str]:
    """The tokens of a tokenizer.json, in the order of their ids."""
    try:
        ids = json.loads(text)["model"]["vocab"]
        tokens = sorted(ids, key=ids.get)
        numbers = [ids[token] for token in tokens]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--vocab_file {path}: not the tokenizer.json of a BERT") from None
    if numbers != list(range(len(tokens))):
        raise UserError(f"--vocab_file {path}: its {len(tokens)} tokens are not numbered from 0")
    return tokens


def save_vocabulary(path, tokens: list[str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def continuing_tokens(tokens: list[str]) -> np.ndarray:
    """For each token, whether it continues a word.  (tokens,) bool"""
    return np.array([token.startswith("##") and len(token) > 2 for token in tokens])


def text_steps(lower_case: bool) -> tuple:
    """What comes before WordPiece: clean (and lower-case, strip accents), then split at spaces and punctuation."""
    return normalizers.BertNormalizer(lowercase=lower_case), pre_tokenizers.BertPreTokenizer()


def train_vocabulary(paths, size: int, lower_case: bool, unused_tokens: int = 0) -> list[str]:
    """A vocabulary of up to `size` tokens from lines of text: the special tokens, [unused0] …, the characters, then the
    rest.

    `tokenizers` would number the characters in the order of a hash table.  They are given to it in sorted order, so
    that the same text always gives the same vocabulary.
    """
    lines = sample_lines([Path(path) for path in paths], TRAINING_BYTES)
    alphabet, continuing = frequent_characters(lines, lower_case, size // 2)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = text_steps(lower_case)
    first = [*SPECIAL_TOKENS, *(f"[unused{number}]" for number in range(unused_tokens)), *alphabet,
             *(f"##{character}" for character in continuing)]
    if len(first) > size:
        raise UserError(f"--vocab_size {size}: the special tokens, --unused_tokens {unused_tokens} and the characters "
                        f"of the text alone need {len(first)}")
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, limit_alphabet=max(USUAL_ALPHABET, len(alphabet)), initial_alphabet=alphabet,
        show_progress=False, special_tokens=first)
    tokenizer.train_from_iterator(lines, trainer)
    ids = tokenizer.get_vocab()
    if len(ids) > size:
        raise UserError(f"--vocab_size {size}: the {len(ids)} characters of the text alone need more")
    return sorted(ids, key=ids.get)


def sample_lines(paths, limit: int) -> list[str]:
    """Lines of all files: `limit` bytes in pieces that are spread evenly over all of the text."""
    share = min(1.0, limit / max(1, sum(path.stat().st_size for path in paths)))
    lines, number = [], 0
    for path in paths:
        with open_text(path, errors="ignore") as file:
            while piece := file.readlines(SAMPLED_BYTES):
                number += 1
                if int(number * share) > int((number - 1) * share):
                    lines += "".join(piece).split("\n")
    return lines


def frequent_characters(lines, lower_case: bool, most: int) -> tuple[list[str], list[str]]:
    """The most frequent characters in sorted order, and those of them that occur inside a word.

    They are USUAL_ALPHABET or, for a script of more, up to `most`, as many as COVERED asks for.
    """
    words = Counter(word for line in lines for word in line.split())
    normalizer, pre_tokenizer = text_steps(lower_case)
    counts, inside = Counter(), set()
    for word, count in words.items():
        for part, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(word)):
            inside.update(part[1:])
            for character in part:
                counts[character] += count
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    covering = np.searchsorted(np.cumsum([counts[character] for character in ordered]), COVERED * counts.total()) + 1
    alphabet = sorted(ordered[:max(USUAL_ALPHABET, min(most, covering))])
    return alphabet, sorted(inside.intersection(alphabet))


def reference_tokenizer(tokens: list[str], lower_case: bool) -> Tokenizer:
    """BERT's tokenizer without its special tokens: "[SEP]" in a text is three tokens, never the separator."""
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=LONGEST_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = text_steps(lower_case)
    return tokenizer


class WordPieceEncoder:
    """Encodes lists of sentences.  `description` names the library; for the slow one, also the reason."""

    def __init__(self, tokens: list[str], lower_case: bool, fast: bool = True):
        self.reference = reference_tokenizer(tokens, lower_case)
        self.fast, self.description = None, "tokenizers"
        if fast:
            self.fast, self.description = fast_tokenizer(self.reference)

    def encode(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, offsets): sentence i is ids[offsets[i]:offsets[i + 1]]."""
        if self.fast:
            ids, offsets = encode_fast(self.fast, sentences)
            sample = sentences[::CHECK_EVERY]
            expected, _ = encode_reference(self.reference, sample)
            found = [ids[offsets[i]:offsets[i + 1]] for i in range(0, len(sentences), CHECK_EVERY)]
            if np.array_equal(expected, np.concatenate(found) if found else expected):
                return ids, offsets
            self.fast, self.description = None, "tokenizers (nanotoken gave other ids on this text)"
            warnings.warn(self.description, stacklevel=2)
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
