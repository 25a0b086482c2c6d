"""The MLM loss of each source of a mixture."""

import torch


class SourceLosses:
    """Sums up the losses of micro-batches by source, on the device, until they are read.

    `device` and `ranks` are those of the run.  Micro-batches whose loss is not finite do not count.
    """

    def __init__(self, names: list[str], device, ranks):
        self.names = names
        self.ranks = ranks
        self.device = device
        # Chosen by a tensor, because an index would be a constant of the graph
        self.chosen = [row.to(device.torch_device) for row in torch.eye(len(names)).unsqueeze(-1)]  # (sources, 1) each
        self.sums = self.zeros()

    def add(self, source: int, mlm_loss: torch.Tensor) -> None:
        """Count a micro-batch of a source.  In place, as Trainer.train_step says."""
        finite = torch.isfinite(mlm_loss).float()
        loss_and_count = torch.stack([mlm_loss.masked_fill(finite == 0.0, 0.0), finite])
        self.sums += self.chosen[source] * loss_and_count

    def read(self) -> dict[str, float]:
        """The mean loss of each source that gave a micro-batch since the last reading, over all ranks."""
        sums, self.sums = self.ranks.sum(self.sums.cpu()).tolist(), self.zeros()
        return {name: loss / count for name, (loss, count) in zip(self.names, sums, strict=True) if count}

    def zeros(self) -> torch.Tensor:
        return torch.zeros(len(self.names), 2).to(self.device.torch_device, non_blocking=True)
