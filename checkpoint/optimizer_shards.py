"""The optimizer's state in checkpoints, in one piece or sharded, saved by any number of ranks and loaded by any other.

In one piece it is the optimizer's state_dict, under "optimizer" in ckpt_<step>.pt.

Sharded, it lies in a folder beside that file.  Every rank writes ckpt_<step>.optim/rank_<r>_of_<N>.pt, {"state":
{number of a parameter: {"exp_avg": tensor, "exp_avg_sq": tensor}}} for its own share, all at the same time and with
nothing gathered anywhere; numbers are those of the state_dict in one piece.  index.json tells what lies where:

    {"files": {"rank_0_of_4.pt": {"bytes": 1234, "parameters": [0, 5, …]}, …}}

The folder is made under a temporary name.  "optimizer" in ckpt_<step>.pt, which takes its name last and so marks the
whole, then holds {"folder": "ckpt_<step>.optim", "param_groups": […]}.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from checkpoint.file import check_sealed, read_file, write_file
from common.errors import UserError
from common.files import sync_folder, write_json
from optim.build import local_part

INDEX = "index.json"


def folder_of(checkpoint) -> Path:
    """ckpt_7.pt → ckpt_7.optim"""
    return Path(checkpoint).with_suffix(".optim")


def save_optimizer(checkpoint, optimizer, ranks) -> dict:
    """What belongs under "optimizer" in a checkpoint.  Sharded state is written here: all ranks call this together.

    Raises OSError on all ranks where the disk of one does not take its share.
    """
    local = local_part(optimizer)
    if local is optimizer:
        return optimizer.state_dict()
    folder = folder_of(checkpoint)
    temporary = folder.with_name(f".{folder.name}.tmp")
    groups = numbered_groups(optimizer)
    file = temporary / f"rank_{ranks.rank}_of_{ranks.world_size}.pt"
    files = together(ranks, partial(write_share, file, optimizer, groups))
    together(ranks, partial(complete, temporary, dict(files), Path(checkpoint)) if ranks.first else lambda: None)
    return {"folder": folder.name, "param_groups": groups}


def numbered_groups(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The param_groups as a state_dict has them: parameters by number, counted through all groups."""
    groups, first = [], 0
    for group in optimizer.param_groups:
        groups.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return groups


def write_share(file: Path, optimizer, groups: list[dict]) -> tuple[str, dict]:
    """Write the moments that this rank holds; the file's name, and what the index says of it."""
    numbers = {parameter: number for group, numbered in zip(optimizer.param_groups, groups, strict=True)
               for parameter, number in zip(group["params"], numbered["params"], strict=True)}
    share = {numbers[parameter]: {key: value.detach().cpu() for key, value in moments.items()}
             for parameter, moments in local_part(optimizer).state.items()}
    write_file(file, {"state": share})
    return file.name, {"bytes": file.stat().st_size, "parameters": list(share)}


def together(ranks, action) -> list:
    """What `action` returns on each rank, on every rank.  OSError on all of them where one of them met one."""
    try:
        outcome = action(), None
    except OSError as error:
        outcome = None, f"rank {ranks.rank}: {error}"
    outcomes = ranks.gather(outcome)
    faults = [fault for _, fault in outcomes if fault]
    if faults:
        raise OSError(faults[0])
    return [result for result, _ in outcomes]


def complete(temporary: Path, files: dict[str, dict], checkpoint: Path) -> None:
    """Write the index, and give the folder its name.  A checkpoint that is to be replaced goes first."""
    for path in temporary.iterdir():
        if path.name not in files:
            path.unlink()  # of a run that was killed
    for left in checkpoint.parent.glob(".ckpt_*.optim.tmp"):
        if left != temporary:
            shutil.rmtree(left)  # of such a run too
    write_json(temporary / INDEX, {"files": files})
    remove(checkpoint)
    os.replace(temporary, folder_of(checkpoint))
    sync_folder(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint and its folder; the file, which marks it as whole, first."""
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(folder_of(checkpoint), ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Give a checkpoint, and its folder, names that no run takes for a checkpoint's."""
    for path in (checkpoint, folder_of(checkpoint)):
        if path.exists():
            path.replace(f"{path}.set_aside")


def check_complete(checkpoint, state) -> None:
    """UserError where the sharded state of a checkpoint is not whole; `state` is its "optimizer".

    All its bytes are read: a run must know of a fault in them while it can still go on from another checkpoint.
    """
    if isinstance(state, dict) and "folder" in state:
        folder = folder_named(checkpoint, state)
        for name in sorted(set(read_index(folder).values())):
            check_sealed(folder / name)


def folder_named(checkpoint, state: dict) -> Path:
    """The folder that a checkpoint's "optimizer" names, beside the checkpoint."""
    return Path(checkpoint).parent / Path(str(state["folder"])).name


def read_index(folder: Path) -> dict[int, str]:
    """Which file holds each parameter's moments.  UserError where the folder is not whole."""
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            size = (folder / name).stat().st_size
            if size != facts["bytes"]:
                raise UserError(f"{folder / name}: has {size} bytes, its index says {facts['bytes']}")
        return {number: name for name, facts in files.items() for number in facts["parameters"]}
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file: the checkpoint's optimizer state is not whole") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX}: not a readable index: {error!r}") from None


def read_moments(checkpoint, state: dict, numbers: list[int]) -> dict:
    """The moments of some parameters by number, out of a checkpoint's "optimizer", or the files that hold them."""
    if "folder" not in state:
        if not isinstance(state.get("state"), dict):
            raise UserError(f"{checkpoint}: its optimizer does not hold state and param_groups")
        return state["state"]
    folder = folder_named(checkpoint, state)
    places = read_index(folder)
    missing = sorted(set(numbers) - set(places))
    if missing:
        raise UserError(f"{folder}: no optimizer state of parameter {missing[0]} in it ({len(missing)} are missing)")
    found = {}
    for name in sorted({places[number] for number in numbers}):
        share = read_file(folder / name).get("state")
        if not isinstance(share, dict):
            raise UserError(f"{folder / name}: holds no state")
        found |= {number: share[number] for number in numbers if number in share}
    return found
