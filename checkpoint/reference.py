"""Checkpoints from within a phase of the trainer that this one follows: NVIDIA's and Habana's run_pretraining.py.

    model, optimizer   weights and moments, the same as here
    master params      the weights in fp32, by the optimizer's numbers, where the run was in fp16
    files              [number of the next file, all files in the order of the epoch]
    epoch              of that order
    data_loader        the DataLoader of the file in use on the first card; its set has the file's name as input_file

On N cards, card r uses files r, N + r, 2·N + r, … of the order.  N is not in the checkpoint, but where the file in use
stands in the order is: those before it are finished.  A run that resumes reads the file in use from its beginning.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint.load import groups_of
from checkpoint.pickle_reader import Placeholder
from common.errors import whole_number
from data.row_order import shard_order

USED_FILES, MASTER_WEIGHTS = "used files", "master params"


@dataclass(frozen=True)
class UsedFiles:
    """Which files a run had finished: `names` in their order, the number of the next one, and the one in use."""

    names: list[str]
    following: int
    in_use: str | None

    def finished(self, cards: int) -> list[str]:
        """The files before the one in use; where that is not known, those that so many cards had finished."""
        if self.in_use in self.names:
            return self.names[:self.names.index(self.in_use)]
        return self.names[:max(0, self.following - 1) * cards % max(1, len(self.names))]

    def position(self, stream, path) -> dict:
        """The state_dict of a BatchStream that goes on behind the finished files; it reports where that is.

        The order of the shards is drawn from the seed by their numbers.  So they are numbered in such a way that the
        finished ones come first.
        """
        rows = {shard.path.name: shard.rows for shard in stream.shards}
        finished = self.finished(stream.ranks.world_size)
        if not self.names or not rows.keys() >= set(finished):
            which = "it names no files" if not self.names else f"{min(set(finished) - rows.keys())} is not here"
            stream.warn(f"{path}: which shards its run had finished cannot be told ({which}): going on from row 0")
            return {"rows": 0}
        names = list(dict.fromkeys([*finished, *(name for name in self.names if name in rows), *rows]))
        order = shard_order(stream.seed, 0, len(names)).tolist()
        numbered = dict(sorted(zip(order, names, strict=True)))
        used = sum(rows[name] for name in set(finished))
        stream.warn(f"{path}: its run had finished {len(set(finished))} of {len(rows)} shards, which count as used: "
                    f"going on from row {used} of {sum(rows.values())}, with {names[len(set(finished))]}"
                    + ("" if self.in_use in self.names else ", as if its run had had as many cards as this one"))
        return {"rows": used, "shards": {name: rows[name] for name in numbered.values()}}


def resumed(contents: dict, path, step: int, warn) -> dict:
    """The contents by the keys of TrainingState, to go on at this step of the phase."""
    kept = {key: contents[key] for key in ("model", "config", MASTER_WEIGHTS) if key in contents}
    kept[USED_FILES] = used_files(contents)
    optimizer = contents.get("optimizer")
    if optimizer is None or (isinstance(optimizer, dict) and optimizer.get("param_groups") == []):
        warn(f"{path} holds no moments of an optimizer: they begin with zeros")
        return kept
    groups = [{**group, "step": steps_made(group, optimizer, step, path)} for group in groups_of(optimizer, path)]
    made = {group["step"] for group in groups}
    if made != {step}:
        warn(f"{path}: its optimizer has made {', '.join(map(str, sorted(made)))} steps, but by its name this is step "
             f"{step} of the phase; going on at step {step}, and with the optimizer's own count")
    return {**kept, "optimizer": {**optimizer, "param_groups": groups}}


def steps_made(group: dict, optimizer: dict, default: int, path) -> int:
    """The steps that an optimizer made: some count by group, some by weight, some not at all."""
    state, numbers = optimizer.get("state"), group.get("params")
    first = numbers[0] if isinstance(numbers, list) and numbers and type(numbers[0]) is int else None
    by_weight = state.get(first) if isinstance(state, dict) else None
    counts = [values.get("step") for values in (group, by_weight) if isinstance(values, dict)]
    step = next((count for count in counts if count is not None), default)
    step = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
    return whole_number({"step": step}, "step", f"{path}: optimizer")


def used_files(contents: dict) -> UsedFiles:
    """What a checkpoint says of the files; no names where it says nothing that can be used."""
    following, *names = contents["files"] if isinstance(contents.get("files"), list) and contents["files"] else [None]
    if type(following) is not int or not all(isinstance(name, str) for name in names):
        return UsedFiles([], 0, None)
    loader = contents.get("data_loader")
    data = loader.attribute("dataset") if isinstance(loader, Placeholder) else None
    in_use = data.attribute("input_file") if isinstance(data, Placeholder) else None
    return UsedFiles([Path(name).name for name in names], following,
                     Path(in_use).name if isinstance(in_use, str) else None)
