"""Synthetic training samples: small unpacked shards that obey the schema in full, for tests and benchmarks."""

import functools

import numpy as np

from data.masking import MaskingRule
from data.shards import MASK_KEYS, write_shard

CLS, SEP, MASK, FIRST_WORD = 101, 102, 103, 1000  # as in BERT's uncased vocabulary
VOCAB_SIZE = 30522


def write_unpacked_shard(path, lengths, seed=0, sequence_length=128, predictions=20, masked_lm_prob=0.15) -> dict:
    """Write an unpacked shard with one row for each of `lengths` (tokens, 5 or more), and return its rows."""
    rows = unpacked_rows(np.asarray(lengths), np.random.default_rng(seed), sequence_length, predictions, masked_lm_prob)
    write_shard(path, rows)
    return rows


@functools.cache
def rule(predictions=20) -> MaskingRule:
    """The rule of shards without masks."""
    return MaskingRule(0.15, predictions, VOCAB_SIZE, (0, 100, CLS, SEP, MASK))


def write_shard_without_masks(path, lengths, seed=0, sequence_length=128, predictions=20) -> dict:
    """The same for --dynamic_masking."""
    rows = without_masks(unpacked_rows(np.asarray(lengths), np.random.default_rng(seed), sequence_length, predictions))
    write_shard(path, rows, rule(predictions), predictions)
    return rows


def without_masks(rows: dict) -> dict:
    """The rows with every masked token shown."""
    input_ids = rows["input_ids"].copy()
    row, slot = np.nonzero(rows["masked_lm_positions"])
    input_ids[row, rows["masked_lm_positions"][row, slot]] = rows["masked_lm_ids"][row, slot]
    return {key: values for key, values in rows.items() if key not in MASK_KEYS} | {"input_ids": input_ids}


def unpacked_rows(lengths, rng, sequence_length=128, predictions=20, masked_lm_prob=0.15) -> dict[str, np.ndarray]:
    """Rows of [CLS] A [SEP] B [SEP] with random words, masked as Devlin et al. do, with random labels.

    Like real text, a row has the masked tokens that its length asks for, but at most `predictions`.
    """
    assert ((lengths >= 5) & (lengths <= sequence_length)).all(), "5 tokens: [CLS] A [SEP] B [SEP]"
    count, offsets = len(lengths), np.arange(sequence_length)
    last_of_a = rng.integers(2, lengths - 2)  # the first [SEP]; A and B hold a token at least
    real = offsets < lengths[:, None]
    words = rng.integers(FIRST_WORD, VOCAB_SIZE, (count, sequence_length), dtype=np.int32)
    special = (offsets == 0) | (offsets == last_of_a[:, None]) | (offsets == lengths[:, None] - 1)
    words[special] = SEP
    words[:, 0] = CLS

    maskable = real & ~special
    wanted = np.minimum(np.clip(np.round(lengths * masked_lm_prob), 1, predictions), np.count_nonzero(maskable, axis=1))
    priority = np.where(maskable, rng.random((count, sequence_length), dtype=np.float32), 2.0)
    chosen = np.argsort(priority, axis=1)[:, :predictions]
    chosen = np.where(np.arange(chosen.shape[1]) < wanted[:, None], chosen, sequence_length)
    chosen.sort(axis=1)
    used = chosen < sequence_length
    positions = np.zeros((count, predictions), np.int32)
    positions[:, :chosen.shape[1]] = np.where(used, chosen, 0)
    ids = np.where(positions > 0, np.take_along_axis(words, positions, axis=1), 0)

    row, slot = np.nonzero(positions)
    masked = words.copy()
    masked[row, positions[row, slot]] = replacements(words[row, positions[row, slot]], rng)
    return {
        "input_ids": np.where(real, masked, 0),
        "input_mask": real.astype(np.int8),
        "segment_ids": (real & (offsets > last_of_a[:, None])).astype(np.int8),
        "masked_lm_positions": positions,
        "masked_lm_ids": ids.astype(np.int32),
        "next_sentence_labels": rng.integers(0, 2, count).astype(np.int8),
    }


def replacements(words, rng):
    """What the model sees instead of the chosen words: 80 % [MASK], 10 % a random word, 10 % the word itself."""
    dice = rng.random(len(words))
    random_words = rng.integers(FIRST_WORD, VOCAB_SIZE, len(words), dtype=np.int32)
    return np.where(dice < 0.8, MASK, np.where(dice < 0.9, random_words, words))
