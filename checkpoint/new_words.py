"""Rows of the embeddings for words that the data's vocabulary has beyond the one that a model was trained with."""

import torch

from checkpoint.file import is_plain
from checkpoint.huggingface import BIAS, DECODER, NEVER_PREDICTED, WORDS
from checkpoint.reference import MASTER_WEIGHTS
from data.tokenizer import WordPieceEncoder
from data.vocabulary import VOCABULARY, Vocabulary


def new_word_pieces(old: list[str], new: list[str], lower_case: bool) -> dict[int, list[int]]:
    """The id of each word that `new` has in a place where `old` has another token or none → the ids of its pieces.

    The pieces are those of the `old` vocabulary, which the model knows: a word that it cannot write is [UNK].

        >>> tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "sea", "##bed"]
        >>> new_word_pieces(tokens, [*tokens[:5], "seabed", "sea", "##bed", "gull"], lower_case=True)
        {5: [6, 7], 8: [1]}
    """
    ids = [number for number, word in enumerate(new) if number >= len(old) or word != old[number]]
    pieces, offsets = WordPieceEncoder(old, lower_case, fast=False).encode([new[number] for number in ids])
    return {number: pieces[offsets[i]:offsets[i + 1]].tolist() for i, number in enumerate(ids)}


def added_words(contents: dict, known: Vocabulary | None, wanted: Vocabulary | None) -> tuple[dict, int]:
    """The contents of a checkpoint of the `known` vocabulary made fit for the `wanted` one that extends it, and how
    many words were added.  What is not known, no extension or malformed changes nothing.
    """
    if not (known and wanted and wanted.extends(known) and has_rows(contents, known.size)):
        return contents, 0
    pieces = new_word_pieces(known.tokens, wanted.tokens, wanted.lower_case is not False)
    if not pieces:
        return contents, 0
    vocab_size = max(wanted.size, contents["config"]["vocab_size"])
    return {**with_new_words(contents, pieces, vocab_size), VOCABULARY: wanted.to_dict()}, len(pieces)


def has_rows(contents: dict, tokens: int) -> bool:
    """Whether the weights are those of a vocabulary of as many tokens or, as published ones, a few more."""
    config, weights = contents.get("config"), contents["model"]
    vocab_size = config.get("vocab_size") if isinstance(config, dict) else None
    return type(vocab_size) is int and vocab_size >= tokens and WORDS in weights and all(
        is_plain(weights[name]) and weights[name].dim() == dimensions and len(weights[name]) >= vocab_size
        for name, dimensions in ((WORDS, 2), (BIAS, 1)) if name in weights)


def with_new_words(contents: dict, pieces: dict[int, list[int]], vocab_size: int) -> dict:
    """The contents of a checkpoint with these words in its weights, of a vocabulary of `vocab_size`, padded.

    The row of a word is the mean of its pieces' rows (Koto et al. 2021, arXiv 2109.04607), and so is its bias in the
    masked-LM head: its logit is then the mean of theirs.  Other rows that the model did not have are never predicted.
    The moments of the optimizer, which have no such rows, are left out.
    """
    weights, config = contents["model"], contents["config"]
    known = config["vocab_size"]
    grown = {name: extended_rows(weights[name][:known], pieces, vocab_size, NEVER_PREDICTED if name == BIAS else 0.0)
             for name in (WORDS, BIAS) if name in weights}
    if f"{DECODER}.weight" in weights:
        grown[f"{DECODER}.weight"] = grown[WORDS]
    kept = {key: value for key, value in contents.items() if key not in ("optimizer", MASTER_WEIGHTS)}
    return {**kept, "model": {**weights, **grown}, "config": {**config, "vocab_size": vocab_size}}


def extended_rows(rows: torch.Tensor, pieces: dict[int, list[int]], vocab_size: int, added: float) -> torch.Tensor:
    """rows (words, …) → (padded vocab_size, …): with the means of the pieces' rows, and `added` in other new rows."""
    missing = -(-vocab_size // 8) * 8 - len(rows)
    extended = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), added)])
    for number, parts in pieces.items():
        extended[number] = rows[parts].float().mean(0)
    return extended
