"""The figures of a model on held-out shards: what evaluate.py prints and the training run logs."""

from contextlib import nullcontext
from itertools import islice

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data.dataloader import batches_once
from modeling import IGNORED_LABEL, mlm_labels, nsp_labels


@torch.no_grad()
def evaluate(model, held_out, device, batch_size: int, precision=None, progress: bool = False,
             process=None) -> dict[str, float]:
    """The figures over every masked token and every sequence of the shards, in eval mode.

    Where there are several ranks, each takes its share of the batches, and all have the figures of the whole.
    Returns mlm_loss (nats), mlm_accuracy, nsp_loss, nsp_accuracy, masked_tokens, sequences.
    """
    was_training = model.training
    model.eval()
    rank, world_size = (process.rank, process.world_size) if process else (0, 1)
    total = torch.zeros(6, dtype=torch.float64)
    rows = sum(shard.rows for shard in held_out)
    with tqdm(total=rows, unit="row", desc="evaluating", disable=None if progress else True, leave=False) as bar:
        for batch in islice(batches_once(held_out, batch_size, model.config.vocab_size), rank, None, world_size):
            sums = batch_sums(model, device.put(batch), precision)
            device.mark_step()
            total += sums.cpu()  # added up here in float64, which not every device has
            bar.update(min(batch_size * world_size, rows - bar.n))
    model.train(was_training)
    total = process.sum(total) if process else total
    mlm_loss, mlm_right, masked_tokens, nsp_loss, nsp_right, sequences = total.tolist()
    return {"mlm_loss": mlm_loss / max(masked_tokens, 1), "mlm_accuracy": mlm_right / max(masked_tokens, 1),
            "nsp_loss": nsp_loss / max(sequences, 1), "nsp_accuracy": nsp_right / max(sequences, 1),
            "masked_tokens": int(masked_tokens), "sequences": int(sequences)}


def batch_sums(model, batch, precision) -> torch.Tensor:
    """Six sums over a batch: for MLM, then NSP, the cross entropy, the right guesses and the labels.  (6,) fp32"""
    with precision.autocast() if precision else nullcontext():
        logits = model.logits(batch)
    sums = []
    for scores, labels in zip(logits, (mlm_labels(batch), nsp_labels(batch)), strict=True):
        scores, labels = scores.flatten(0, 1).float(), labels.flatten()
        sums.append(F.cross_entropy(scores, labels, ignore_index=IGNORED_LABEL, reduction="sum"))
        sums.append((scores.argmax(-1) == labels).sum())
        sums.append((labels != IGNORED_LABEL).sum())
    return torch.stack([value.float() for value in sums])


def describe(figures: dict) -> str:
    return (f"MLM loss {figures['mlm_loss']:.4f}, MLM accuracy {figures['mlm_accuracy']:.2%} "
            f"({figures['masked_tokens']} masked tokens), NSP accuracy {figures['nsp_accuracy']:.2%} "
            f"({figures['sequences']} sequences)")
