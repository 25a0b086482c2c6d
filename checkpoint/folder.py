"""Checkpoints: ckpt_<step>.pt files of plain tensors, written whole or not at all, the newest three kept.

The step in a name counts over both phases (phase 2 goes on from --phase1_end_step).  A file holds: model (the names of
modeling.py), optimizer (state and param_groups; optimizer_shards.py where it is sharded), step (of the phase), phase,
rows (how many rows of the phase's endless sequence are used up), data (its shards, and which are left out), skipped
(counts of steps), scaler (of --fp16), config (the architecture).  A folder that transformers loads is read as a
checkpoint of weights.
"""

import re
from pathlib import Path

from checkpoint import file as checkpoint_file
from checkpoint import huggingface
from checkpoint import optimizer_shards as optimizer_state
from common.errors import UserError

KEPT = 3


def path_of(folder, step: int) -> Path:
    return Path(folder) / f"ckpt_{step}.pt"


def steps(folder) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; none where there is no folder."""
    matches = [re.fullmatch(r"ckpt_(\d+)\.pt", path.name) for path in Path(folder).glob("ckpt_*.pt")]
    return sorted(int(match.group(1)) for match in matches if match)


def save(folder, step: int, state: dict, protected: int = -1) -> Path:
    """Write ckpt_<step>.pt, and only when it is safe remove all but the newest three.

    `protected` is a step that is never removed.  A run that goes on from an older checkpoint finds newer ones, damaged
    or rewound: they become ckpt_<step>.pt.set_aside, so that no later run takes them for its newest.
    """
    path = path_of(folder, step)
    checkpoint_file.write(path, state)
    for newer in steps(folder):
        if newer > step:
            optimizer_state.set_aside(path_of(folder, newer))
    rotate(folder, protected)
    return path


def rotate(folder, protected: int = -1) -> None:
    for step in [step for step in steps(folder) if step != protected][:-KEPT]:
        optimizer_state.remove(path_of(folder, step))


def load(path) -> dict:
    """The contents of a checkpoint, on the host.  Nothing in it is executed: tensors and plain values only."""
    if Path(path).is_dir():
        return huggingface.load(path)
    state = checkpoint_file.read(path)
    if not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a checkpoint: it holds no model")
    return state


def load_whole(path) -> dict:
    """The same, for a run that goes on from it: with sharded optimizer state, the folder beside it must be whole."""
    state = load(path)
    optimizer_state.check(path, state.get("optimizer"))
    return state


def newest(folder, report) -> tuple[int, dict]:
    """The newest checkpoint that can be read, as (step in its name, contents); damaged ones are reported and passed.

    UserError where none can be read: to start anew is for the user to decide.
    """
    for step in reversed(steps(folder)):
        try:
            return step, load_whole(path_of(folder, step))
        except UserError as error:
            report(f"passed over a damaged checkpoint: {error}")
    raise UserError(f"--output_dir {folder}: none of its {len(steps(folder))} checkpoints can be read; "
                    f"move them away to start anew")
