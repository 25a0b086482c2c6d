"""Checkpoints: ckpt_<step>.pt files of plain tensors, written whole or not at all, the newest three kept.

The step in a name counts over both phases (phase 2 goes on from --phase1_end_step).  A file holds: model (the names of
modeling.py), optimizer (state and param_groups), step (of the phase), phase, rows (how many rows of the phase's endless
sequence are used up), config (the architecture).  A folder that transformers loads is read as a checkpoint of weights.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

import huggingface
from cli import UserError
from file_utils import local_file, replacing

KEPT = 3
FREE_TO_DIFFER = ("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range")  # no weight depends on it


def path_of(folder, step: int) -> Path:
    return Path(folder) / f"ckpt_{step}.pt"


def steps(folder) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; none where there is no folder."""
    matches = [re.fullmatch(r"ckpt_(\d+)\.pt", path.name) for path in Path(folder).glob("ckpt_*.pt")]
    return sorted(int(match.group(1)) for match in matches if match)


def save(folder, step: int, state: dict, protected: int = -1) -> Path:
    """Write ckpt_<step>.pt, then remove all but the newest three; `protected` is a step that is never removed."""
    path = path_of(folder, step)
    with replacing(path) as temporary:
        torch.save(state, temporary)
    rotate(folder, protected)
    return path


def rotate(folder, protected: int = -1) -> None:
    for step in [step for step in steps(folder) if step != protected][:-KEPT]:
        path_of(folder, step).unlink()


def load(path) -> dict:
    """The contents of a checkpoint, on the host.  Nothing in it is executed: tensors and plain values only."""
    if Path(path).is_dir():
        return huggingface.load(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises whatever a damaged zip or pickle happens to cause
        raise UserError(f"{path}: not a readable checkpoint: {first_line(error)}") from None
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a checkpoint: it holds no model")
    return state


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def newest(folder, report) -> tuple[int, dict] | None:
    """The newest checkpoint that can be read, as (step in its name, contents); damaged ones are reported and passed."""
    for step in reversed(steps(folder)):
        try:
            return step, load(path_of(folder, step))
        except UserError as error:
            report(f"passed over a damaged checkpoint: {error}")
    return None


def load_into(model, path) -> dict:
    """Load the weights of the checkpoint at `path`, a path or a URL; returns its contents."""
    state = load(local_file(path))
    check_architecture(model.config, state, path)
    load_model(model, state["model"], path)
    return state


def check_architecture(config, state: dict, path) -> None:
    """Shapes do not tell all (heads, activation): refuse a checkpoint that says it is of another architecture."""
    for key, value in (state.get("config") or {}).items():
        own = getattr(config, key, value)
        if own != value and key not in FREE_TO_DIFFER:
            raise UserError(f"{path}: {key} is {value!r} in it, {own!r} in the config")


def load_model(model, state_dict: dict, path) -> None:
    """Load weights by name.  Word embeddings of the unpadded vocabulary are padded with zeros first."""
    expected = model.state_dict()
    given = {name.removeprefix("_orig_mod.").removeprefix("module."): value for name, value in state_dict.items()}
    given = {name: padded_to(value, expected[name]) for name, value in given.items() if name in expected}
    missing = sorted(set(expected) - set(given))
    if missing:
        raise UserError(f"{path}: no weight {missing[0]} in it ({len(missing)} of {len(expected)} missing)")
    for name, value in given.items():
        if value.shape != expected[name].shape:
            raise UserError(f"{path}: {name} has shape {tuple(value.shape)}, "
                            f"the config makes it {tuple(expected[name].shape)}")
    model.load_state_dict(given, strict=True)


def padded_to(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """`value` with zero rows added where only the padding of the vocabulary (less than 8 rows) is missing."""
    missing = expected.shape[0] - value.shape[0] if value.dim() == expected.dim() > 0 else 0
    if 0 < missing < 8 and value.shape[1:] == expected.shape[1:]:
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value


def load_optimizer(optimizer, state: dict, path) -> None:
    """Load moments and step count; the rate, decay and betas stay those of this run."""
    groups = [{key: value for key, value in group.items() if key not in ("params", "step")}
              for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: its optimizer state does not fit this model: {first_line(error)}") from None
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
        group["step"] = int(group.get("step", 0))


@dataclass(frozen=True)
class Start:
    """Where a run starts: at a step of its phase, with so many rows of the phase used up, from a checkpoint or none."""

    step: int = 0
    rows: int = 0
    path: Path | None = None
    state: dict | None = None  # its "optimizer" may be None: weights alone


def find_start(args, report) -> Start:
    """What the flags and the checkpoints in --output_dir make the run start from (SPEC: phases and resuming).

    Without --resume_from_checkpoint the folder may hold none.  In phase 2 the newest number decides: phase 1's last
    starts the phase, a higher one resumes it, a lower one is an error.
    """
    present = steps(args.output_dir)
    if present and not args.resume_from_checkpoint:
        raise UserError(f"--output_dir {args.output_dir}: holds ckpt_{present[-1]}.pt already; "
                        f"go on from it with --resume_from_checkpoint, or name another folder")
    found = resumed_checkpoint(args, report) if present else None
    if found:
        return start_from(args, *found)
    if args.phase2:
        raise UserError(f"--output_dir {args.output_dir}: no checkpoint in it that can be read; "
                        f"--phase2 goes on from ckpt_{args.phase1_end_step}.pt")
    if args.init_checkpoint:
        state = load(local_file(args.init_checkpoint))
        state["optimizer"] = with_step_zero(state.get("optimizer")) if args.resume_from_checkpoint else None
        return Start(path=args.init_checkpoint, state=state)
    if args.resume_from_checkpoint:
        report(f"no checkpoint in {args.output_dir} to resume from: starting at step 0")
    return Start()


def resumed_checkpoint(args, report) -> tuple[int, dict] | None:
    if args.resume_step == -1:
        return newest(args.output_dir, report)
    return args.resume_step, load(path_of(args.output_dir, args.resume_step))


def start_from(args, number: int, state: dict) -> Start:
    """The start that ckpt_<number>.pt gives in the phase of this run."""
    path = path_of(args.output_dir, number)
    if args.phase2 and number < args.phase1_end_step:
        raise UserError(f"{path}: below --phase1_end_step {args.phase1_end_step}: phase 1 is not finished")
    if args.phase2 and number == args.phase1_end_step:
        state["optimizer"] = with_step_zero(state.get("optimizer"))
        return Start(path=path, state=state)
    phase = 2 if args.phase2 else 1
    if state.get("phase", phase) != phase:
        raise UserError(f"{path}: was written in phase {state['phase']}, this run is phase {phase} (--phase2)")
    step = number - args.phase1_end_step if args.phase2 else number
    return Start(step=step, rows=int(state.get("rows", 0)), path=path, state=state)


def with_step_zero(optimizer: dict | None) -> dict | None:
    """The moments kept, the steps counted anew: how phase 2 starts."""
    if optimizer is None:
        return None
    return {**optimizer, "param_groups": [{**group, "step": 0} for group in optimizer["param_groups"]]}
