"""Where a run starts: at step 0, from given weights, or from a checkpoint in its own folder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import huggingface, reference
from checkpoint.folder import checkpoint_path, newest_readable, read_checkpoint, read_complete, saved_steps
from checkpoint.load import groups_of, without_nsp
from checkpoint.new_words import added_words
from checkpoint.state import INIT_CHECKPOINT, OWN_KEYS, PHASE_STEPS, TrainingState, with_current_keys
from common.download import local_file
from common.errors import UserError, whole_number
from data.vocabulary import VOCABULARY, Vocabulary, vocabulary_in

PHASE1_STEPS = 7038  # of the published recipe


@dataclass(frozen=True)
class Phase:
    """Phase 1 or 2.  A checkpoint's number is `first` (0, in phase 2 --phase1_end_step) + the step of the phase."""

    number: int = 1
    first: int = 0


def last_step_of_phase1(folder, warn: Callable[[str], None]) -> int:
    """Where phase 1 ended, by the checkpoints that phase 2 is to continue from, where no flag says it.

    UserError where they leave it open.  In a folder without checkpoints it is that of the published recipe.
    """
    present = saved_steps(folder)
    if not present or PHASE1_STEPS in present:
        return PHASE1_STEPS
    number, contents = newest_readable(folder, warn)
    path = checkpoint_path(folder, number)
    step = whole_number(contents, "step", path, number)
    if whole_number(contents, "phase", path, 1) == 2:
        return number - step
    planned = whole_number(contents, PHASE_STEPS, path) if PHASE_STEPS in contents else None
    if step == planned or (planned is None and len(present) == 1):
        return number
    names = ", ".join(checkpoint_path(folder, one).name for one in present)
    reason = (f"which of {names} ended phase 1?" if planned is None
              else f"phase 1 is not finished: {path.name} is step {step} of {planned}")
    raise UserError(f"--output_dir {folder}: {reason}; --phase2 continues from ckpt_N.pt with --phase1_end_step N")


@dataclass(frozen=True)
class ResumePoint:
    """Steps of the phase that are done, and the checkpoint to load, if any."""

    step: int = 0
    path: Path | str | None = None
    contents: dict | None = None  # the keys of TrainingState that the run continues with
    init_checkpoint: str | None = None  # --init_checkpoint of the run's first start
    new_words: int = 0  # that were added to the vocabulary of --init_checkpoint
    shown_path: str | None = None  # where the user finds it: in object storage, `path` is a copy

    def with_words_of(self, vocabulary: Vocabulary | None, warn: Callable[[str], None]) -> "ResumePoint":
        """A start from --init_checkpoint with the words that the data's vocabulary has beyond its own."""
        if self.contents is None or self.path != self.init_checkpoint:
            return self
        contents, words = added_words(self.contents, vocabulary_in(self.contents, self.path), vocabulary)
        if words and "optimizer" in self.contents:
            warn(f"{self.path}: the optimizer's moments in it are left out, since its vocabulary gets new words")
        return replace(self, contents=contents, new_words=words)

    def for_objective(self, nsp: bool) -> "ResumePoint":
        """A start from weights alone, without those of next sentence prediction where the data has none."""
        if nsp or self.contents is None or "optimizer" in self.contents:
            return self
        return replace(self, contents=without_nsp(self.contents))

    def restore(self, state: TrainingState) -> None:
        """Load the checkpoint, if there is one."""
        if self.contents is not None:
            state.load_state_dict(self.contents, self.path)

    @property
    def origin(self) -> str:
        """In words, where the weights come from, and which of them start fresh; "" where all do."""
        fresh = huggingface.fresh_parts(self.contents or {})
        return ((f", from {self.shown_path or self.path}" if self.path else "")
                + (f"; not in it, so of fresh weights: {fresh}" if fresh else "")
                + (f"; {self.new_words:,} new words begin as the means of their pieces" if self.new_words else ""))

    def describe(self) -> str:
        rows = self.contents.get("data", {}).get("rows", 0) if self.contents else 0
        path = self.path if self.path == self.init_checkpoint else Path(self.path).name  # which can lie anywhere here
        return f"step {self.step}, {rows} rows used, {path or 'no checkpoint'}"


def find_resume_point(folder, phase: Phase, *, resume: bool, resume_step: int, init_checkpoint: str | None,
                      warn: Callable[[str], None]) -> ResumePoint:
    """Where a run of this phase starts.

    Without `resume` (--resume_from_checkpoint) the folder may hold no checkpoint.  In phase 2 the newest number
    decides: phase 1's last checkpoint starts the phase, a higher one resumes it, a lower one is an error.  In an empty
    folder --init_checkpoint starts either phase; beside checkpoints it must be what their run began with.
    """
    present = saved_steps(folder)
    if present and not resume:
        raise UserError(f"--output_dir {folder}: holds ckpt_{present[-1]}.pt already; "
                        f"continue from it with --resume_from_checkpoint, or name another folder")
    if present:
        number, contents = (newest_readable(folder, warn) if resume_step == -1 else
                            (resume_step, read_complete(folder, resume_step)))
        path = checkpoint_path(folder, number)
        shown_path = f"{folder}/{path.name}"
        begun_with = contents.get(INIT_CHECKPOINT)
        begun_with = begun_with if isinstance(begun_with, str) else None
        if init_checkpoint and begun_with != init_checkpoint:
            raise UserError(f"--init_checkpoint {init_checkpoint}: {shown_path} is there already, and its run began "
                            f"with {begun_with or 'fresh weights'}; leave the flag out to continue from {path.name}, "
                            f"or name another --output_dir")
        return replace(resume_point_at(path, number, contents, phase, warn), init_checkpoint=begun_with,
                       shown_path=shown_path)
    if init_checkpoint:
        contents = read_checkpoint(local_file(init_checkpoint))
        return ResumePoint(path=init_checkpoint, contents=at_step_zero(contents, init_checkpoint, moments=resume),
                           init_checkpoint=init_checkpoint)
    if phase.number == 2:
        raise UserError(f"--output_dir {folder}: no checkpoint in it; --phase2 continues from ckpt_{phase.first}.pt, "
                        f"or from an --init_checkpoint")
    if resume:
        warn(f"no checkpoint in {folder} to resume from: starting at step 0")
    return ResumePoint()


def resume_point_at(path: Path, number: int, contents: dict, phase: Phase, warn: Callable[[str], None]) -> ResumePoint:
    """The resume point that ckpt_<number>.pt gives in this phase."""
    if number < phase.first:
        raise UserError(f"{path}: below --phase1_end_step {phase.first}: phase 1 is not finished")
    if phase.number == 2 and number == phase.first:
        return ResumePoint(path=path, contents=at_step_zero(contents, path, moments=True))
    if not OWN_KEYS & contents.keys():
        return ResumePoint(number - phase.first, path, reference.resumed(contents, path, number - phase.first, warn))
    if whole_number(contents, "phase", path, phase.number) != phase.number:
        raise UserError(f"{path}: was written in phase {contents['phase']}, "
                        f"this run is phase {phase.number} (--phase2)")
    step = number - phase.first
    if whole_number(contents, "step", path, step) != step:
        raise UserError(f"{path}: holds step {contents['step']} of its phase, but its name says {step}")
    contents = with_current_keys(contents, path)
    if whole_number(contents["data"], "rows", path) == 0 and "rows" not in contents["data"]:
        warn(f"{path} does not hold the position in the data: starting at the first row")
    return ResumePoint(step, path, contents)


def at_step_zero(contents: dict, path, moments: bool) -> dict:
    """The weights of a checkpoint and, if asked for, the optimizer's moments, with the step count set to 0."""
    keys = ("model", "config", VOCABULARY, huggingface.FRESH, reference.MASTER_WEIGHTS)
    kept = {key: contents[key] for key in keys if key in contents}
    optimizer = contents.get("optimizer")
    if optimizer is None or not moments:
        return kept
    groups = groups_of(optimizer, path)
    return {**kept, "optimizer": {**optimizer, "param_groups": [{**group, "step": 0} for group in groups]}}
