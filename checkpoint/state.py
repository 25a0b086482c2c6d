"""The contents of a checkpoint.  Only this file knows all its keys; reference.py knows those of other trainers."""

from dataclasses import dataclass, field

import torch

from checkpoint import optimizer_shards, reference
from checkpoint.load import holds_nsp, load_master_weights, load_model, load_optimizer
from common.errors import UserError, dictionary, whole_number
from data.dataloader import BatchStream
from data.origin import TEXTS
from data.token_counts import TOKEN_COUNTS
from data.vocabulary import VOCABULARY, Vocabulary
from modeling import BertForPreTraining
from optim.build import local_optimizer, restore_skip_counts, skip_counts

INIT_CHECKPOINT = "init_checkpoint"
OWN_KEYS = {"phase", "data", "rows"}  # a checkpoint that has none of them was written by another trainer
PHASE_STEPS = "phase_steps"
STEP_ROWS = "step_rows"
OPTIMIZER_NAME = "optimizer_name"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """The parts of a run that its next step depends on.  Keys in the file:

        model       weights, by the names of modeling.py; with --no_nsp without pooler and next-sentence head
        config      the architecture (BertConfig)
        optimizer   moments and steps, or the folder that holds them (optimizer_shards.py)
        optimizer_name   --optimizer; lamb where there is none
        skipped     counts of the steps that were skipped because a number was not finite
        scaler      the loss scale of --fp16
        data        the position in the stream of batches
        token_counts   how often each token occurs in the training set: evaluate.py works out from it what can be
                    predicted without context
        early_stopping   the lowest held-out loss so far, where --early_stopping is given
        vocabulary  that of the training set, with its tokens where the shards carry them: data.vocabulary.Vocabulary
        texts       what the training shards were made from, as far as they say it (data/origin.py)
        init_checkpoint   --init_checkpoint of the run's first start, or None
        step, phase the step of the phase, and 1 or 2
        phase_steps the steps that the phase is to have, --max_steps
        step_rows   the rows that an optimizer step is to have over all ranks

    From a checkpoint of the reference trainer (reference.py) also, never written here:

        master params   the weights in fp32, where the run was in fp16
        used files      which shards its run had finished

    To save another part, give it state_dict() and load_state_dict(), which checks its values, and add it to both
    methods here.
    """

    model: BertForPreTraining
    optimizer: torch.optim.Optimizer
    stream: BatchStream
    precision: object  # devices.precision.Precision
    token_counts: torch.Tensor  # (vocab_size,) int64, on the host
    vocabulary: Vocabulary | None = None
    texts: list[str] = field(default_factory=list)
    init_checkpoint: str | None = None
    early_stopping: object = None  # training.early_stopping.EarlyStopping, or None

    def state_dict(self, path, ranks, batches_ahead: int) -> dict:
        """The contents of the checkpoint at `path`, without step and phase.

        `batches_ahead`: unused micro-batches that each rank holds.  Sharded optimizer state is written here, so all
        ranks call this together; OSError on all of them where one cannot write its share.
        """
        # With keep_vars a tied weight is one tensor, not two that share their memory: it is copied once.
        return {"model": self.model.state_dict(keep_vars=True), "config": vars(self.model.config),
                "optimizer": optimizer_shards.save_optimizer(path, self.optimizer, ranks),
                OPTIMIZER_NAME: local_optimizer(self.optimizer).name,
                "skipped": skip_counts(self.optimizer), "scaler": self.precision.state_dict(),
                "data": self.stream.state_dict(batches_ahead), TOKEN_COUNTS: self.token_counts,
                VOCABULARY: self.vocabulary.to_dict() if self.vocabulary else {},
                TEXTS: self.texts, INIT_CHECKPOINT: self.init_checkpoint,
                **({"early_stopping": self.early_stopping.state_dict()} if self.early_stopping else {})}

    def load_state_dict(self, contents: dict, path) -> None:
        """Load the contents of the checkpoint at `path`, as far as present.  UserError where a value is malformed."""
        if contents.get("optimizer") is not None and holds_nsp(contents) != self.model.has_nsp:
            with_, without = ("the checkpoint", "the training data") if holds_nsp(contents) else (
                "the training data", "the checkpoint")
            raise UserError(f"{path}: {with_} has next sentence prediction, {without} was made without (--no_nsp), so "
                            f"the training cannot go on; --init_checkpoint with another --output_dir takes the weights")
        load_model(self.model, contents, path)
        if contents.get(reference.MASTER_WEIGHTS) is not None:
            try:
                load_master_weights(self.optimizer, contents[reference.MASTER_WEIGHTS], path)
            except UserError as error:
                self.stream.warn(f"the weights are those of `model`: {error}")
        if contents.get("optimizer") is not None:
            self.check_optimizer_name(contents, path)
            load_optimizer(self.optimizer, contents["optimizer"], path)
        skipped = dictionary(contents, "skipped", path)
        restore_skip_counts(self.optimizer, {name: whole_number(skipped, name, path) for name in skipped})
        self.precision.load_state_dict(dictionary(contents, "scaler", path))
        if "data" in contents:
            self.stream.load_state_dict(dictionary(contents, "data", path), path)
        if reference.USED_FILES in contents:
            self.stream.load_state_dict(contents[reference.USED_FILES].position(self.stream, path), path)
        if self.early_stopping:
            self.early_stopping.load_state_dict(dictionary(contents, "early_stopping", path), path)

    def check_optimizer_name(self, contents: dict, path) -> None:
        """UserError where the run was begun with another optimizer, whose rate means something else.

        A new phase takes over the moments of either: they mean the same.
        """
        saved, own = contents.get(OPTIMIZER_NAME), local_optimizer(self.optimizer).name
        if saved is not None and saved != own:
            raise UserError(f"{path}: written with --optimizer {repr(saved)[:50]}, this run has --optimizer {own}; "
                            f"a run continues with the optimizer that it began with")


def with_current_keys(contents: dict, path) -> dict:
    """The contents with the keys of earlier versions replaced by the current ones."""
    data = dict(dictionary(contents, "data", path))
    if "rows" in contents:
        data["rows"] = contents["rows"]
    if "left_out" in data:
        data["skipped_shards"] = data.pop("left_out")
    return {**contents, "data": data}
