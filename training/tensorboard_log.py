"""The figures of a run for TensorBoard: the same that go to the log file, over the steps of both phases.

    pip install tensorboard
    python3 run_pretraining.py … --tensorboard_logdir results/tensorboard
    tensorboard --logdir results/tensorboard
"""

from common.errors import UserError

TAGS = {  # key in the log → name in TensorBoard, grouped by what stands before the slash
    "average_loss": "loss/total", "mlm_loss": "loss/mlm", "nsp_loss": "loss/nsp",
    "eval_mlm_loss": "held_out/mlm_loss", "eval_mlm_accuracy": "held_out/mlm_accuracy",
    "eval_nsp_loss": "held_out/nsp_loss", "eval_nsp_accuracy": "held_out/nsp_accuracy",
    "learning_rate": "optimizer/learning_rate", "gradient_norm": "optimizer/gradient_norm",
    "skipped_steps": "optimizer/skipped_steps",
    "average_perf_per_step": "speed/sequences_per_second", "average_training_time_step": "speed/seconds_per_step",
    "data_waiting_share": "speed/data_waiting_share",
}


def summary_writer():
    """PyTorch's SummaryWriter; UserError where the package tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard_logdir needs the package tensorboard (pip install tensorboard): "
                        f"{error}") from None
    return SummaryWriter


class TensorBoardLog:
    """Writes to `folder`.  `offset` is added to every step: the last step of phase 1 in phase 2.

    A run that goes on after step `start` hides what an interrupted one wrote of later steps.
    """

    def __init__(self, folder, offset: int, start: int):
        self.offset = offset
        try:
            self.writer = summary_writer()(str(folder), purge_step=offset + start + 1)
        except OSError as error:
            raise UserError(f"--tensorboard_logdir {folder}: {error.strerror}") from None

    def add(self, step: int, data: dict) -> None:
        for key, tag in TAGS.items():
            if data.get(key) is not None:
                self.writer.add_scalar(tag, data[key], self.offset + step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
