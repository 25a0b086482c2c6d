"""When a run ends because its held-out loss no longer falls (--early_stopping).  No torch here."""

import math
from dataclasses import dataclass

from common.errors import UserError, whole_number


@dataclass
class EarlyStopping:
    """Counts the evaluations since the lowest held-out MLM loss."""

    patience: int  # evaluations without a new lowest loss after which the run ends
    lowest_loss: float = math.inf
    best_checkpoint: int = -1  # the number of the checkpoint with the lowest loss; -1 = none yet
    evaluations_since: int = 0

    def record(self, loss: float, checkpoint: int) -> bool:
        """Take in the loss at a checkpoint; whether it is the lowest so far."""
        lowest = loss < self.lowest_loss
        if lowest:
            self.lowest_loss, self.best_checkpoint, self.evaluations_since = loss, checkpoint, 0
        else:
            self.evaluations_since += 1
        return lowest

    @property
    def is_over(self) -> bool:
        return self.evaluations_since >= self.patience

    def describe(self) -> str:
        return f"the lowest held-out MLM loss, {self.lowest_loss:.4f}, is that of ckpt_{self.best_checkpoint}.pt"

    def state_dict(self) -> dict:
        return {"lowest_loss": self.lowest_loss, "best_checkpoint": self.best_checkpoint,
                "evaluations_since": self.evaluations_since}

    def load_state_dict(self, state: dict, path) -> None:
        """UserError where a value of the checkpoint at `path` is malformed."""
        if not state:
            return
        loss = state.get("lowest_loss")
        if not isinstance(loss, float) or math.isnan(loss):
            raise UserError(f"{path}: the lowest_loss of its early stopping is {loss!r}, not a number")
        self.lowest_loss = loss
        self.best_checkpoint = whole_number(state, "best_checkpoint", path) if loss < math.inf else -1
        self.evaluations_since = whole_number(state, "evaluations_since", path)
