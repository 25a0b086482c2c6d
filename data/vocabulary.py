"""WordPiece vocabularies: reading one, and training one on text shards.

`tokenizers` trains.  Left alone it numbers the characters in the order of a hash table, so that every run gives another
vocabulary; here they are given in sorted order, and the same text always gives the same file.
"""

from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from common.errors import UserError
from common.files import replacing

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LARGEST_ALPHABET = 1000  # characters, as in BERT's own vocabulary
TRAINING_BYTES = 100 << 20  # text read for training, spread over the files; bounds the memory


def read(path, flag: str = "--vocab_file") -> list[str]:
    """The tokens of a vocabulary file, one a line, in the order of their ids.

    Raises UserError where the file is missing, is no text, repeats a token or lacks a special one.
    """
    try:
        tokens = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path}: cannot be read ({error})") from None
    tokens = [token.rstrip("\r") for token in (tokens[:-1] if tokens[-1] == "" else tokens)]
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"{flag} {path}: no {', '.join(missing)} among its {len(tokens)} tokens")
    if len(tokens) <= len(SPECIAL_TOKENS):
        raise UserError(f"{flag} {path}: no words beside the special tokens")
    repeated = [token for token, count in Counter(tokens).items() if count > 1]
    if repeated:
        raise UserError(f"{flag} {path}: {len(repeated)} tokens stand there twice, {repeated[0]!r} first")
    return tokens


def write(path, tokens: list[str]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")


def text_steps(lower_case: bool) -> tuple:
    """BERT's steps before WordPiece: clean (and lower-case, strip accents), then cut at spaces and punctuation."""
    return normalizers.BertNormalizer(lowercase=lower_case), pre_tokenizers.BertPreTokenizer()


def train(paths, size: int, lower_case: bool) -> list[str]:
    """A vocabulary of up to `size` tokens from lines of text: the special tokens, the characters, then the rest."""
    lines = sample_lines([Path(path) for path in paths], TRAINING_BYTES)
    alphabet, continuing = characters(lines, lower_case)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = text_steps(lower_case)
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, limit_alphabet=LARGEST_ALPHABET, initial_alphabet=alphabet, show_progress=False,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in continuing)])
    tokenizer.train_from_iterator(lines, trainer)
    ids = tokenizer.get_vocab()
    if len(ids) > size:
        raise UserError(f"--vocab_size {size}: the {len(ids)} characters of the text alone need more")
    return sorted(ids, key=ids.get)


def sample_lines(paths, limit: int) -> list[str]:
    """Lines from the start of every file, the same share of each, `limit` bytes in all."""
    share = min(1.0, limit / max(1, sum(path.stat().st_size for path in paths)))
    lines = []
    for path in paths:
        with open(path, encoding="utf-8", errors="ignore") as file:
            lines += file.read(int(share * path.stat().st_size)).split("\n")
    return lines


def characters(lines, lower_case: bool) -> tuple[list[str], list[str]]:
    """The most frequent characters of the words in sorted order, and those of them that stand inside a word."""
    words = Counter(word for line in lines for word in line.split())
    normalizer, pre_tokenizer = text_steps(lower_case)
    counts, inside = Counter(), set()
    for word, count in words.items():
        for part, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(word)):
            inside.update(part[1:])
            for character in part:
                counts[character] += count
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:LARGEST_ALPHABET])
    return alphabet, sorted(inside.intersection(alphabet))
