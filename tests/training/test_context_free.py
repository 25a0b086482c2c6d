"""What can be predicted without context, and that a model gets below it by attention alone."""

import json
import math

import numpy as np
import pytest
import torch

import evaluate
import modeling
import pack_pretraining_data_pytorch
import run_pretraining
from data.masking import MaskingRule, masked
from data.shards import find_shards, metadata_path, read_rows, write_shard
from data.token_counts import count_tokens, stored_counts
from tests.support import samples, small_run, synthetic
from training.context_free import ContextFreeModel

PAD, UNK, CLS, SEP, MASK, FIRST_WORD = range(6)
VOCABULARY, LENGTH, STEPS = 30, 16, 450
RULE = MaskingRule(0.3, 5, VOCABULARY, (PAD, UNK, CLS, SEP, MASK))


def test_the_line_by_hand():
    """7 tokens, of which the last two are words that occur 6 and 2 times; 5 special ones."""
    model = ContextFreeModel.from_counts(np.array([0, 0, 0, 0, 0, 6, 2]))
    frequent, rare = 7 / 15, 3 / 15  # one more each, of 8 + 7
    kept = 0.1 * rare / (0.1 * rare + 0.1 / 2)
    shown, labels, is_mask = torch.tensor([4, 6, 6, 4]), torch.tensor([5, 6, 5, 6]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    expected = [-math.log(frequent), -math.log(kept + (1 - kept) * rare), -math.log((1 - kept) * frequent),
                -math.log(rare)]
    assert model.losses(shown, labels, is_mask).tolist() == pytest.approx(expected, abs=1e-6)
    assert kept < (1 - kept) * frequent, "so that even the shown word is not the best guess"
    assert model.predictions(shown, is_mask).tolist() == [5, 5, 5, 5]
    assert model.predictions(torch.tensor([5]), torch.tensor([0.0])).tolist() == [5]


def chain_rows(count: int, seed: int) -> dict[str, np.ndarray]:
    """Rows in which each word is decided by the one before it."""
    rng = np.random.default_rng(seed)
    after = np.random.default_rng(0).permutation(VOCABULARY - FIRST_WORD) + FIRST_WORD
    words = np.empty((count, LENGTH - 2), np.int32)
    words[:, 0] = rng.integers(FIRST_WORD, VOCABULARY, count)
    for place in range(1, LENGTH - 2):
        words[:, place] = after[words[:, place - 1] - FIRST_WORD]
    input_ids = np.concatenate([np.full((count, 1), CLS), words, np.full((count, 1), SEP)], axis=1).astype(np.int32)
    rows = {"input_ids": input_ids, "input_mask": np.ones((count, LENGTH), np.int8),
            "segment_ids": np.zeros((count, LENGTH), np.int8),
            "next_sentence_labels": (np.arange(count) % 4 == 0).astype(np.int8)}
    return rows | masked(rows, RULE, 5, rng.integers(0, 2**63, count).astype(np.uint64))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder with shards of such rows, held-out ones, and a config."""
    folder = tmp_path_factory.mktemp("chain")
    write_shard(folder / "data" / "chain_training_0.hdf5", chain_rows(400, 1))
    write_shard(folder / "held_out" / "chain_test_0.hdf5", chain_rows(100, 2))
    samples.write_config(folder / "config.json", vocab_size=VOCABULARY, max_position_embeddings=LENGTH, hidden_size=32,
                         num_attention_heads=2, initializer_range=0.04, hidden_dropout_prob=0.0,
                         attention_probs_dropout_prob=0.0)
    return folder


def train_on(chain, output: str) -> dict:
    """Train; the held-out figures at the end."""
    run_pretraining.main(small_run.flags(
        config_file=chain / "config.json", input_dir=chain / "data", output_dir=chain / output,
        json_summary=chain / f"{output}.json", eval_dir=chain / "held_out", max_seq_length=LENGTH,
        max_predictions_per_seq=5, train_batch_size=32, gradient_accumulation_steps=1, max_steps=STEPS, log_freq=100,
        warmup_proportion=0.2, learning_rate=0.01, num_steps_per_checkpoint=STEPS, use_cpu_kernels="False"))
    line, = (line for line in samples.log_lines(chain / f"{output}.json") if "eval_mlm_loss" in line["data"])
    return line["data"]


def evaluated(chain, output: str, *flags) -> tuple[int, str]:
    checkpoint = chain / output / f"ckpt_{STEPS}.pt"
    return evaluate.main([f"--config_file={chain / 'config.json'}", f"--checkpoint={checkpoint}",
                          f"--eval_dir={chain / 'held_out'}", "--no_cuda", *map(str, flags)])


def test_only_a_model_with_attention_gets_below_the_line(chain, monkeypatch, capsys):
    whole = train_on(chain, "whole")
    line = whole["eval_context_free_mlm_loss"]
    assert whole["eval_mlm_loss"] < line - 1.0
    assert whole["eval_mlm_accuracy"] > whole["eval_context_free_mlm_accuracy"] + 0.2
    assert evaluated(chain, "whole", "--margin=1.0") == 0
    capsys.readouterr()
    assert evaluated(chain, "whole", "--margin=9") == 1
    assert "error: --margin 9.0: the MLM loss" in capsys.readouterr().err

    forward = modeling.SelfAttention.forward

    def alone(self, hidden, mask):
        """Every token sees itself alone: all others are masked."""
        others = 1.0 - torch.eye(hidden.shape[1])
        return forward(self, hidden, (others * -10000.0)[None, None])

    monkeypatch.setattr(modeling.SelfAttention, "forward", alone)
    cut_off = train_on(chain, "cut_off")
    assert cut_off["eval_context_free_mlm_loss"] == pytest.approx(line)
    assert line - 0.1 < cut_off["eval_mlm_loss"] < line + 0.5, "what is learned without context, and no more"
    assert evaluated(chain, "cut_off", "--margin=0.3") == 1


def test_the_kinds_of_masked_tokens_add_up_to_all(chain, capsys):
    if not (chain / "whole").exists():
        train_on(chain, "whole")
        capsys.readouterr()
    assert evaluated(chain, "whole", "--json", "--batch_size=7", f"--input_dir={chain / 'data'}") == 0
    figures = json.loads(capsys.readouterr().out)
    rows = chain_rows(100, 2)
    row, slot = np.nonzero(rows["masked_lm_positions"])
    labels = rows["masked_lm_ids"][row, slot]
    shown = rows["input_ids"][row, rows["masked_lm_positions"][row, slot]]
    shares = {"mask": (shown == MASK).mean(), "kept": (shown == labels).mean()}
    shares["replaced"] = 1.0 - sum(shares.values())
    for name in ("loss", "accuracy"):
        assert sum(share * figures[f"{kind}_{name}"] for kind, share in shares.items()) == pytest.approx(
            figures[f"mlm_{name}"], abs=1e-5)
    assert figures["masked_tokens"] == len(labels)
    assert figures["nsp_larger_class"] == 0.75
    counts = count_tokens(chain_rows(400, 1), VOCABULARY)
    model = ContextFreeModel.from_counts(counts)
    expected = model.losses(*(torch.from_numpy(value.astype(np.int64)) for value in (shown, labels)),
                            torch.from_numpy((shown == MASK).astype(np.float32)))
    assert figures["context_free_mlm_loss"] == pytest.approx(expected.mean().item(), abs=1e-5)


def test_without_counts_nothing_is_compared(chain, tmp_path, capsys):
    if not (chain / "whole").exists():
        train_on(chain, "whole")
    checkpoint = torch.load(chain / "whole" / f"ckpt_{STEPS}.pt", weights_only=True)
    assert checkpoint["token_counts"].tolist() == count_tokens(chain_rows(400, 1), VOCABULARY).tolist()
    torch.save({"model": checkpoint["model"]}, tmp_path / "foreign.pt")
    capsys.readouterr()
    flags = [f"--config_file={chain / 'config.json'}", f"--checkpoint={tmp_path / 'foreign.pt'}", "--no_cuda",
             f"--eval_dir={chain / 'held_out'}"]
    assert evaluate.main(flags) == 0
    assert "without context" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--margin 0.1: the training set's token counts are in neither"):
        evaluate.main([*flags, "--margin=0.1"])


@pytest.mark.parametrize("write", [synthetic.write_unpacked_shard, synthetic.write_shard_without_masks])
def test_the_packer_counts_the_tokens_as_they_were_before_masking(tmp_path, write):
    samples.write_dataset(tmp_path / "unpacked", (40, 7), write=write)
    pack_pretraining_data_pytorch.main([
        f"--input_dir={tmp_path / 'unpacked'}", f"--output_dir={tmp_path / 'packed'}",
        f"--max_sequence_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_sequence={samples.PREDICTIONS}"])
    expected = np.zeros(synthetic.VOCAB_SIZE, np.int64)
    for shard in find_shards(tmp_path / "unpacked"):
        rows = read_rows(shard)
        if shard.rule is None:
            row, slot = np.nonzero(rows["masked_lm_positions"])
            rows["input_ids"][row, rows["masked_lm_positions"][row, slot]] = rows["masked_lm_ids"][row, slot]
        real = rows["input_mask"] != 0
        expected += np.bincount(rows["input_ids"][real], minlength=synthetic.VOCAB_SIZE)
    expected[[synthetic.CLS, synthetic.SEP]] = 0
    assert stored_counts(find_shards(tmp_path / "packed"), synthetic.VOCAB_SIZE).tolist() == expected.tolist()


@pytest.mark.parametrize("damage, message", [
    ("1 2 x", "no token_counts can be read from it"), (7, "no token_counts can be read from it"),
    ("1 " * 40_000, "its token_counts are of 40000 tokens, but the config's vocab_size is 30522")])
def test_damaged_counts_are_named(tmp_path, damage, message):
    samples.write_dataset(tmp_path / "unpacked", (7,))
    pack_pretraining_data_pytorch.main([
        f"--input_dir={tmp_path / 'unpacked'}", f"--output_dir={tmp_path / 'packed'}",
        f"--max_sequence_length={samples.SEQUENCE_LENGTH}", f"--max_predictions_per_sequence={samples.PREDICTIONS}"])
    metadata = json.loads(metadata_path(tmp_path / "packed").read_text())
    metadata_path(tmp_path / "packed").write_text(json.dumps(metadata | {"token_counts": damage}))
    with pytest.raises(ValueError, match=message):
        stored_counts(find_shards(tmp_path / "packed"), synthetic.VOCAB_SIZE)
