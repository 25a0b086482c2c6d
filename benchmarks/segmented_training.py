"""A training that stops for an evaluation every N steps and then waits for its turn.  time_to_quality.py runs it.

    python benchmarks/segmented_training.py ours JSON
    python benchmarks/segmented_training.py transformers JSON

It prints READY, continues with each line on its standard input, and ends when that is closed.  After each segment it
prints a line REPORT {…} with the steps, the seconds and the held-out figures.  The seconds are those of the training
alone.  So several trainings can take turns, and a slow moment of the machine meets all of them.

ours            the training command.  JSON: its flags as a list
transformers    its BertForPreTraining with AdamW.  JSON: the fields of RivalSettings
"""

import json
import sys
import time
from dataclasses import dataclass
from unittest import mock

from measuring import ROOT  # noqa: F401 (puts the repository's root on the path)

# isort: split
from common import cli

READY, REPORT = "READY", "REPORT "
ATTENTIONS = ("eager", "sdpa")  # of transformers
TIMED_STEPS = 10  # to choose one of them


class SegmentClock:
    """The seconds between the turns and the reports of a training."""

    def __init__(self):
        self.seconds = self.resumed_at = 0.0

    def start(self) -> None:
        print(READY, flush=True)
        self.wait_for_turn()

    def wait_for_turn(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self.resumed_at = time.perf_counter()

    def report(self, step: int, sequences: int, evaluate) -> None:
        """End a segment: evaluate, print the figures, and wait for the next turn."""
        self.seconds += time.perf_counter() - self.resumed_at
        figures = {"step": step, "trained_sequences": sequences, "seconds": self.seconds, **evaluate()}
        print(REPORT + json.dumps(figures), flush=True)
        self.wait_for_turn()


def main(argv=None) -> None:
    kind, settings = sys.argv[1:] if argv is None else argv
    if kind == "ours":
        train_ours(json.loads(settings))
    else:
        train_transformers(RivalSettings(**json.loads(settings)))


def train_ours(flags: list[str]) -> None:
    """The training command; --eval_freq is the length of a segment."""
    import run_pretraining
    from training.trainer import Trainer

    clock, run_steps = SegmentClock(), Trainer.run_steps

    def run_steps_in_turn(trainer):
        clock.start()
        run_steps(trainer)

    def report_evaluation(trainer, step, losses):
        with trainer.paused():
            done = round(step * trainer.plan.rows * trainer.plan.sequences_per_row)
            clock.report(step, done, lambda: trainer.evaluator.evaluate(trainer.model))

    with mock.patch.object(Trainer, "run_steps", run_steps_in_turn), \
            mock.patch.object(Trainer, "evaluate", report_evaluation):
        run_pretraining.main(flags)


@dataclass(frozen=True, kw_only=True)
class RivalSettings:
    """transformers with the AdamW recipe of its Trainer: linear warm-up and decay, clipping at 1.0."""

    config_file: str
    input_dir: str  # unpacked rows
    counts_dir: str  # the same rows packed, whose metadata holds the token counts
    eval_dir: str
    rows: int  # in a step
    learning_rate: float
    steps: int
    every: int  # steps of a segment
    seed: int
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01

    def rate_of(self, step: int) -> float:
        warmup_steps = max(1, round(self.warmup * self.steps))
        if step <= warmup_steps:
            return self.learning_rate * step / warmup_steps
        return self.learning_rate * (self.steps - step) / (self.steps - warmup_steps)


def train_transformers(settings: RivalSettings) -> None:
    """Train transformers' model from our initial weights, on our batches; our evaluator evaluates it."""
    from common.bert_config import BertConfig
    from data.dataloader import BatchStream
    from data.shard_reader import ShardReader
    from data.shards import find_shards
    from devices.device import select_device
    from devices.options import DeviceOptions
    from modeling import BertForPreTraining
    from parallel.ranks import SingleRank
    from parallel.rendezvous import RankInfo

    device, config = select_device(DeviceOptions(no_cuda=True)), BertConfig.from_json_file(settings.config_file)
    ranks = SingleRank(RankInfo())
    device.seed(settings.seed)
    ours = BertForPreTraining(config, device.attentions[-1])
    with ShardReader() as reader:
        stream = BatchStream(find_shards(settings.input_dir), settings.rows, settings.seed, config.vocab_size,
                             ranks=ranks, reader=reader)
        try:
            rival = rival_model(ours, fastest_attention(ours, next(stream)))
            evaluator = rival_evaluator(settings, config, device, ranks)
            run_rival(settings, rival, stream, lambda: evaluator.evaluate(with_weights_of(ours, rival)))
        finally:
            stream.close()


def run_rival(settings: RivalSettings, rival, stream, evaluate) -> None:
    """The training loop of transformers' model."""
    import torch

    from optim.build import parameter_groups
    from train_step import transformers_loss

    optimizer = torch.optim.AdamW(parameter_groups(rival, settings.weight_decay), betas=(0.9, 0.999), eps=1e-8,
                                  fused=True)
    clock = SegmentClock()
    clock.start()
    for step in range(1, settings.steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate_of(step)
        transformers_loss(rival, next(stream))().backward()
        torch.nn.utils.clip_grad_norm_(rival.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % settings.every == 0 or step == settings.steps:
            clock.report(step, step * settings.rows, evaluate)


def rival_model(ours, attention: str):
    """transformers' model in train mode, with our weights."""
    from train_step import transformers_model

    weights = {name.replace("dense_act", "dense"): value for name, value in ours.state_dict().items()}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    rival = transformers_model(ours.config, attention)
    rival.load_state_dict(weights)
    return rival


def fastest_attention(ours, batch: dict) -> str:
    """The attention implementation of transformers with which forward and backward take the least time."""
    from measuring import alternate
    from train_step import training_step, transformers_loss

    models = {attention: rival_model(ours, attention) for attention in ATTENTIONS}
    seconds = alternate({attention: training_step(model, transformers_loss(model, batch))
                         for attention, model in models.items()}, TIMED_STEPS, warm_up=3)
    return min(seconds, key=lambda attention: min(seconds[attention]))


def with_weights_of(ours, rival):
    """Our model with the weights of transformers'."""
    from checkpoint.huggingface import to_ours

    expected = ours.state_dict()
    weights = {to_ours(name): value for name, value in rival.state_dict().items()}
    ours.load_state_dict({name: weights[name] for name in expected})
    return ours


def rival_evaluator(settings: RivalSettings, config, device, ranks):
    import torch

    from data.shards import find_shards
    from data.token_counts import stored_counts
    from training.evaluation import Evaluator

    counts = stored_counts(find_shards(settings.counts_dir), config.vocab_size)
    return Evaluator(shards=find_shards(settings.eval_dir, "test", "--eval_dir"), batch_size=64, device=device,
                     ranks=ranks, token_counts=torch.from_numpy(counts))


if __name__ == "__main__":
    cli.run(main)
