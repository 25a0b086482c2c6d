"""What the micro-batches weigh in the loss of an optimizer step (--normalize_loss).

The model gives the mean over a micro-batch's masked tokens, and over its sequences.  The step takes the mean of these
over its micro-batches and the ranks, so that a masked token weighs more where a micro-batch holds few (MicroBatchMean).
Or every masked token of the step weighs the same, and every sequence (TokenMean): each mean is first multiplied by its
micro-batch's tokens over the average of the step's micro-batches.  These weights are near 1, so that the scale of the
loss, the accumulation and the reduction stay as they are.
"""

from collections import deque

import torch


class MicroBatchMean:
    """Every micro-batch weighs the same."""

    batches_ahead = 1  # micro-batches to take from the stream before they are used

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Called with every micro-batch, on the host, in the order of use."""

    def start_step(self) -> None:
        """Called before the first micro-batch of a step, after its last one was counted."""

    def weighted(self, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The losses of the next micro-batch, of which the step takes the mean."""
        return outputs


class TokenMean(MicroBatchMean):
    """Every masked token, and every sequence, of a step weighs the same, over all micro-batches and ranks.

    The micro-batches of a step are counted while the device computes the step before.  The ranks add up their counts at
    the same time, in one all-reduce between the hosts.
    """

    def __init__(self, accumulation_steps: int, ranks, device):
        self.batches_ahead = accumulation_steps
        self.ranks = ranks
        self.device = device
        self.counts: list[torch.Tensor] = []  # of the micro-batches of the next step
        self.totals = self.work = None  # of all ranks, complete after work.wait()
        self.weights = deque()  # of the micro-batches of this step, on the device

    def count(self, batch) -> None:
        counted = (torch.count_nonzero(batch["masked_lm_positions"]), batch["next_sentence_weights"].sum())
        self.counts.append(torch.stack(counted).double())  # (2,)
        if len(self.counts) == self.batches_ahead:
            self.totals = torch.stack(self.counts).sum(0)
            self.work = self.ranks.start_sum(self.totals)

    def start_step(self) -> None:
        if self.work is not None:
            self.work.wait()
        average = self.totals.clamp(min=1.0) / (self.batches_ahead * self.ranks.world_size)
        self.weights.extend(self.device.put({"weights": (counts / average).float()})["weights"]
                            for counts in self.counts)
        self.counts = []

    def weighted(self, outputs):
        weights = self.weights.popleft()
        mlm_loss = outputs["mlm_loss"] * weights[0]
        if "nsp_loss" not in outputs:
            return {"loss": mlm_loss, "mlm_loss": mlm_loss}
        nsp_loss = outputs["nsp_loss"] * weights[1]
        return {"loss": mlm_loss + nsp_loss, "mlm_loss": mlm_loss, "nsp_loss": nsp_loss}


def build_loss_weights(normalization: str, accumulation_steps: int, ranks, device) -> MicroBatchMean:
    return TokenMean(accumulation_steps, ranks, device) if normalization == "tokens" else MicroBatchMean()
