"""The losses and accuracies of a model on held-out shards, for evaluate.py and the training.

Beside them stands what can be predicted without context (context_free.py), and for NSP the share of the larger class.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

from data.dataloader import batches_once
from data.shard_reader import IN_PROCESS, InProcessReader, ShardReader
from data.shards import LABELS, Shard
from devices.device import Device
from modeling import IGNORED_LABEL, mlm_labels, nsp_labels
from parallel.ranks import SingleRank
from training.context_free import ContextFreeModel

KINDS = ("mask", "kept", "replaced")  # what is shown in place of a predicted token
KIND_SUMS = ("tokens", "loss", "correct", "context_free_loss", "context_free_correct")
NSP_SUMS = ("nsp_loss", "nsp_correct", "random_segments")
SUMS = (*(f"{kind}_{name}" for kind in KINDS for name in KIND_SUMS), "sequences", *NSP_SUMS)


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model on held-out shards; each rank takes its share of the batches."""

    shards: list[Shard]
    batch_size: int  # rows
    device: Device
    ranks: SingleRank
    reader: ShardReader | InProcessReader = IN_PROCESS
    autocast: Callable[[], AbstractContextManager] = nullcontext
    token_counts: torch.Tensor | None = None  # of the training set; without them nothing is compared with frequencies

    @torch.no_grad()
    def evaluate(self, model, progress: bool = False) -> dict[str, float]:
        """The figures by name, the same on all ranks; see figures_of."""
        was_training = model.training
        model.eval()
        frequencies = self.context_free_model()
        total = torch.zeros(len(SUMS), dtype=torch.float64)
        rows, ranks, mask_id = sum(shard.rows for shard in self.shards), self.ranks, None
        batches = batches_once(self.shards, self.batch_size, model.config.vocab_size, self.reader)
        with tqdm(total=rows, unit="row", desc="evaluating", disable=None if progress else True, leave=False) as bar:
            for number, batch in enumerate(batches):
                mask_id = shown_mask_id(batch) if mask_id is None else mask_id
                if number % ranks.world_size == ranks.rank:
                    sums = self.batch_sums(model, self.device.put(batch), frequencies, mask_id)
                    self.device.mark_step()
                    total += sums.cpu()  # on the host, because not every device has float64
                    bar.update(min(self.batch_size * ranks.world_size, rows - bar.n))
        model.train(was_training)
        sums = dict(zip(SUMS, ranks.sum(total).tolist(), strict=True))
        with_nsp = model.has_nsp and self.shards[0].objective.nsp
        return figures_of(sums, with_context_free=frequencies is not None, with_nsp=with_nsp)

    def context_free_model(self) -> ContextFreeModel | None:
        if self.token_counts is None or not self.token_counts.any():
            return None
        return ContextFreeModel.from_counts(self.token_counts, self.device.torch_device)

    def batch_sums(self, model, batch, frequencies: ContextFreeModel | None, mask_id: int) -> torch.Tensor:
        """The SUMS of a batch.  fp32"""
        with self.autocast():
            mlm_logits, nsp_logits = model.logits(batch)
        labels = mlm_labels(batch)  # (B, P)
        shown = batch["input_ids"].gather(1, batch["masked_lm_positions"].long()).long().flatten()  # (B·P,)
        losses, correct, used = per_label(mlm_logits, labels)  # (B·P,) each
        labels = labels.flatten().clamp(min=0)
        is_mask, is_same = (shown == mask_id).float(), (shown == labels).float()
        values = [used, losses, correct]
        if frequencies:
            values += [frequencies.losses(shown, labels, is_mask) * used,
                       (frequencies.predictions(shown, is_mask) == labels).float() * used]
        else:
            values += [torch.zeros_like(used)] * 2
        kinds = (is_mask, (1.0 - is_mask) * is_same, (1.0 - is_mask) * (1.0 - is_same))
        sums = [(value * kind).sum() for kind in kinds for value in values]

        sums.append(batch["next_sentence_weights"].sum().float())
        if nsp_logits is None or LABELS not in batch:
            return torch.stack([*sums, *[torch.zeros_like(sums[0])] * len(NSP_SUMS)])
        losses, correct, _ = per_label(nsp_logits, nsp_labels(batch))
        random_segments = (nsp_labels(batch) == 1).float()
        return torch.stack([*sums, losses.sum(), correct.sum(), random_segments.sum()])


def per_label(logits, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross entropy, 1.0 where the likeliest class is the label, 1.0 where a label is in use.  (…, C), (…) → (n,) fp32

    All are 0 where the label is ignored.
    """
    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="none")
    return losses, (logits.argmax(-1) == labels).float(), (labels != IGNORED_LABEL).float()


def shown_mask_id(batch: dict[str, torch.Tensor]) -> int | None:
    """The id of [MASK]: what most of the predicted tokens show that do not show themselves.  From a host batch.

    None where every predicted token shows itself.
    """
    positions = batch["masked_lm_positions"].long()
    shown = batch["input_ids"].gather(1, positions)
    changed = shown[(positions != 0) & (shown != batch["masked_lm_ids"])]
    return int(changed.mode().values) if len(changed) else None


def figures_of(sums: dict[str, float], with_context_free: bool, with_nsp: bool) -> dict[str, float]:
    """The figures of an evaluation: losses in nats, accuracies and nsp_larger_class as shares, and counts.

    mlm_loss and mlm_accuracy are over all predicted tokens, mask_…, kept_… and replaced_… over those that show [MASK],
    themselves, or another word.  The context_free ones are what a model without context reaches on the same tokens.
    Those of NSP are left out where the model or the data have none.
    """
    for name in KIND_SUMS:
        sums[f"mlm_{name}"] = sum(sums[f"{kind}_{name}"] for kind in KINDS)
    sequences = max(sums["sequences"], 1)
    random_share = sums["random_segments"] / sequences
    figures = {"mlm_loss": 0.0, "mlm_accuracy": 0.0}
    if with_nsp:
        figures |= {"nsp_loss": sums["nsp_loss"] / sequences, "nsp_accuracy": sums["nsp_correct"] / sequences,
                    "nsp_larger_class": max(random_share, 1 - random_share)}
    for kind in ("mlm", *KINDS):
        tokens = max(sums[f"{kind}_tokens"], 1)
        figures[f"{kind}_loss"] = sums[f"{kind}_loss"] / tokens
        figures[f"{kind}_accuracy"] = sums[f"{kind}_correct"] / tokens
        if with_context_free:
            figures[f"{kind}_context_free_loss"] = sums[f"{kind}_context_free_loss"] / tokens
    if with_context_free:
        figures["context_free_mlm_loss"] = figures.pop("mlm_context_free_loss")
        figures["context_free_mlm_accuracy"] = sums["mlm_context_free_correct"] / max(sums["mlm_tokens"], 1)
    return {**figures, "masked_tokens": int(sums["mlm_tokens"]), "sequences": int(sums["sequences"])}


def describe_figures(figures: dict) -> str:
    """The figures in a sentence, against what a model without context reaches."""
    line = figures.get("context_free_mlm_loss")
    below = accuracy = ""
    if line is not None:
        margin = line - figures["mlm_loss"]
        below = (f" ({abs(margin):.2f} {'below' if margin > 0 else 'above'} the {line:.4f} that is reached without "
                 f"context)")
        accuracy = f" (without context {figures['context_free_mlm_accuracy']:.2%})"
    nsp = (f"NSP accuracy {figures['nsp_accuracy']:.2%} (the larger class: {figures['nsp_larger_class']:.2%}); "
           if "nsp_accuracy" in figures else "")
    return (f"MLM loss {figures['mlm_loss']:.4f}{below}, MLM accuracy {figures['mlm_accuracy']:.2%}{accuracy}; "
            f"[MASK] {figures['mask_loss']:.2f}, kept {figures['kept_loss']:.2f}, replaced "
            f"{figures['replaced_loss']:.2f} nats; {nsp}{figures['masked_tokens']} masked tokens in "
            f"{figures['sequences']} sequences")
