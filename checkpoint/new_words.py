"""Rows of the embeddings for words that the data's vocabulary has beyond the one that a model was trained with."""

import torch

from checkpoint.huggingface import BIAS, DECODER, NEVER_PREDICTED, OF_VOCABULARY, WORDS
from checkpoint.reference import MASTER_WEIGHTS
from data.tokenizer import WordPieceEncoder


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


def with_new_words(contents: dict, pieces: dict[int, list[int]], vocab_size: int) -> dict:
    """The contents of a checkpoint with these words in its weights, of a vocabulary of `vocab_size`, padded.

    The row of a word is the mean of its pieces' rows (Koto et al. 2021, arXiv 2109.04607), and so is its bias in the
    masked-LM head: its logit is then the mean of theirs.  Other rows that the model did not have are never predicted.
    The moments of the optimizer, which have no such rows, are left out.
    """
    weights, config = contents["model"], contents.get("config")
    known = config["vocab_size"] if isinstance(config, dict) else len(weights[WORDS])
    grown = {name: extended_rows(weights[name][:known], pieces, vocab_size, NEVER_PREDICTED if name == BIAS else 0.0)
             for name in (WORDS, BIAS) if name in weights}
    if f"{DECODER}.weight" in weights:
        grown[f"{DECODER}.weight"] = grown[WORDS]
    assert grown.keys() <= set(OF_VOCABULARY)
    kept = {key: value for key, value in contents.items() if key not in ("optimizer", MASTER_WEIGHTS)}
    config = {**config, "vocab_size": vocab_size} if isinstance(config, dict) else config
    return {**kept, "model": {**weights, **grown}, "config": config}


def extended_rows(rows: torch.Tensor, pieces: dict[int, list[int]], vocab_size: int, added: float) -> torch.Tensor:
    """rows (words, …) → (padded vocab_size, …): with the means of the pieces' rows, and `added` in other new rows."""
    missing = -(-vocab_size // 8) * 8 - len(rows)
    extended = torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), added)])
    for number, parts in pieces.items():
        extended[number] = rows[parts].float().mean(0)
    return extended
