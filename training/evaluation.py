"""The losses and accuracies of a model on held-out shards, for evaluate.py and the training."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data.dataloader import batches_once
from data.shards import Shard
from devices.device import Device
from modeling import IGNORED_LABEL, mlm_labels, nsp_labels
from parallel.ranks import SingleRank


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model on held-out shards; each rank takes its share of the batches."""

    shards: list[Shard]
    batch_size: int  # rows
    device: Device
    ranks: SingleRank
    autocast: Callable[[], AbstractContextManager] = nullcontext

    @torch.no_grad()
    def evaluate(self, model, progress: bool = False) -> dict[str, float]:
        """mlm_loss (nats), mlm_accuracy, nsp_loss, nsp_accuracy, masked_tokens, sequences; the same on all ranks."""
        was_training = model.training
        model.eval()
        total = torch.zeros(6, dtype=torch.float64)
        rows, ranks = sum(shard.rows for shard in self.shards), self.ranks
        with tqdm(total=rows, unit="row", desc="evaluating", disable=None if progress else True, leave=False) as bar:
            batches = batches_once(self.shards, self.batch_size, model.config.vocab_size)
            for batch in islice(batches, ranks.rank, None, ranks.world_size):
                sums = self.batch_sums(model, self.device.put(batch))
                self.device.mark_step()
                total += sums.cpu()  # on the host, because not every device has float64
                bar.update(min(self.batch_size * ranks.world_size, rows - bar.n))
        model.train(was_training)
        mlm_loss, mlm_correct, masked_tokens, nsp_loss, nsp_correct, sequences = ranks.sum(total).tolist()
        return {"mlm_loss": mlm_loss / max(masked_tokens, 1), "mlm_accuracy": mlm_correct / max(masked_tokens, 1),
                "nsp_loss": nsp_loss / max(sequences, 1), "nsp_accuracy": nsp_correct / max(sequences, 1),
                "masked_tokens": int(masked_tokens), "sequences": int(sequences)}

    def batch_sums(self, model, batch) -> torch.Tensor:
        """Sums over a batch, for MLM, then NSP: cross entropy, correct predictions, labels.  (6,) fp32"""
        with self.autocast():
            mlm_logits, nsp_logits = model.logits(batch)
        sums = []
        for logits, labels in ((mlm_logits, mlm_labels(batch)), (nsp_logits, nsp_labels(batch))):
            logits, labels = logits.flatten(0, 1).float(), labels.flatten()
            sums.append(F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum"))
            sums.append((logits.argmax(-1) == labels).sum())
            sums.append((labels != IGNORED_LABEL).sum())
        return torch.stack([value.float() for value in sums])


def describe_figures(figures: dict) -> str:
    return (f"MLM loss {figures['mlm_loss']:.4f}, MLM accuracy {figures['mlm_accuracy']:.2%} "
            f"({figures['masked_tokens']} masked tokens), NSP accuracy {figures['nsp_accuracy']:.2%} "
            f"({figures['sequences']} sequences)")
