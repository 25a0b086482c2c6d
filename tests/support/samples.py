"""Small batches, models and data sets that several tests share."""

import json

import numpy as np
import torch

from common.bert_config import BertConfig
from data.dataloader import BatchStream, as_batch
from data.shard_reader import ShardReader
from parallel.ranks import SingleRank
from parallel.rendezvous import RankInfo
from tests.support import synthetic

SEQUENCE_LENGTH, PREDICTIONS = 24, 4
TINY = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 24,
        "initializer_range": 0.02, "intermediate_size": 40, "max_position_embeddings": 32, "num_attention_heads": 3,
        "num_hidden_layers": 2, "type_vocab_size": 2, "vocab_size": synthetic.VOCAB_SIZE}


def config(**changes) -> BertConfig:
    return BertConfig(**{**TINY, **changes})


def unpacked_batch(lengths, seed: int = 0, sequence_length: int = SEQUENCE_LENGTH) -> dict[str, torch.Tensor]:
    rows = synthetic.unpacked_rows(np.asarray(lengths), np.random.default_rng(seed), sequence_length, PREDICTIONS)
    return as_batch(rows)


def packed_batch(batch: dict, rows: list[list[int]], sequence_length: int) -> dict[str, torch.Tensor]:
    """Rows that hold the named rows of an unpacked batch one behind the other."""
    sequences, slots = max(map(len, rows)), batch["masked_lm_ids"].shape[1]
    packed = {key: torch.zeros(len(rows), sequence_length, dtype=torch.int32)
              for key in ("input_ids", "input_mask", "segment_ids", "positions")}
    packed |= {key: torch.zeros(len(rows), slots * sequences, dtype=torch.int32)
               for key in ("masked_lm_positions", "masked_lm_ids")}
    packed |= {key: torch.zeros(len(rows), sequences, dtype=torch.int32)
               for key in ("next_sentence_positions", "next_sentence_labels", "next_sentence_weights")}
    for row, members in enumerate(rows):
        start = 0
        for number, member in enumerate(members):
            length = int(batch["input_mask"][member].sum())
            here = slice(start, start + length)
            for key in ("input_ids", "segment_ids", "positions"):
                packed[key][row, here] = batch[key][member, :length]
            packed["input_mask"][row, here] = number + 1
            masked, own_slots = batch["masked_lm_positions"][member], slice(number * slots, (number + 1) * slots)
            packed["masked_lm_positions"][row, own_slots] = torch.where(masked > 0, masked + start, 0)
            packed["masked_lm_ids"][row, own_slots] = batch["masked_lm_ids"][member]
            packed["next_sentence_positions"][row, number] = start
            packed["next_sentence_labels"][row, number] = batch["next_sentence_labels"][member, 0]
            packed["next_sentence_weights"][row, number] = 1
            start += length
    return packed


def write_dataset(folder, rows_per_shard=(7, 13, 5), split="training", seed=0, sequence_length=SEQUENCE_LENGTH,
                  write=synthetic.write_unpacked_shard):
    """Unpacked shards with rows of many lengths; the folder."""
    rng = np.random.default_rng(seed)
    for number, rows in enumerate(rows_per_shard):
        lengths = rng.integers(5, sequence_length + 1, rows)
        path = folder / f"sample_{split}_{number}.hdf5"
        write(path, lengths, seed + number, sequence_length, PREDICTIONS)
    return folder


def batch_stream(found, size: int, seed: int = 1, rank: int = 0, world_size: int = 1, first_row: int = 0,
                 reader: ShardReader | None = None, vocab_size: int = synthetic.VOCAB_SIZE, **settings) -> BatchStream:
    """The micro-batches of one of several ranks, without the others, from some row of the endless sequence on."""
    stream = BatchStream(found, size, seed, vocab_size, ranks=SingleRank(RankInfo(rank, world_size)),
                         reader=reader or ShardReader(), **settings)
    if first_row:
        stream.load_state_dict({"rows": first_row}, "the test")
    return stream


def write_config(path, **changes):
    path.write_text(json.dumps({**TINY, **changes}))
    return path


def log_lines(path) -> list[dict]:
    """The lines of a log file, parsed."""
    lines = path.read_text().splitlines()
    assert lines and all(line.startswith("DLLL ") for line in lines)
    return [json.loads(line[len("DLLL "):]) for line in lines]


def losses(path) -> dict[int, float]:
    """step → the mean loss of its micro-batches, from a log file."""
    return {line["step"][1]: line["data"]["step_mean_loss"] for line in log_lines(path)
            if isinstance(line["step"], list) and len(line["step"]) == 2 and "step_mean_loss" in line["data"]}
