"""Small runs of run_pretraining.py in this process, and what they leave."""

import resource
from contextlib import contextmanager

import run_pretraining
from tests.support import samples


def write_workspace(folder):
    """A config, training and held-out shards, in a folder in which the commands run."""
    samples.write_config(folder / "config.json")
    samples.write_dataset(folder / "data")
    samples.write_dataset(folder / "held_out", (6,), "test", seed=50)
    return folder


def flags(**changes) -> list[str]:
    """The command line of a small run; a value of None leaves a flag out, True gives it without a value."""
    values = {"do_train": True, "config_file": "config.json", "input_dir": "data", "output_dir": "out",
              "max_seq_length": samples.SEQUENCE_LENGTH, "max_predictions_per_seq": samples.PREDICTIONS,
              "train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 6, "warmup_proportion": 0.3,
              "learning_rate": 0.01, "num_steps_per_checkpoint": 4, "phase1_end_step": 6,
              "json_summary": "out/log.json", "no_cuda": True}
    values.update(changes)
    return [f"--{name}" if value is True else f"--{name}={value}"
            for name, value in values.items() if value is not None and value is not False]


def train(**changes) -> None:
    run_pretraining.main(flags(**changes))


def logged_steps(path) -> dict[int, dict]:
    """step → the figures of its log line that depend on nothing but the training."""
    others = ("time", "perf", "per_second", "waiting", "utilization", "final_loss")  # the last: on where a run ends
    return {line["step"][1]: {name: value for name, value in line["data"].items()
                              if not any(word in name for word in others)}
            for line in samples.log_lines(path) if "step_loss" in line["data"]}


@contextmanager
def files_of_at_most(size: int):
    """A block in which no file of this process can grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
