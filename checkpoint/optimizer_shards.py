"""The optimizer's state in checkpoints, in one piece or sharded, saved by any number of ranks and loaded by any other.

In one piece it is the optimizer's state_dict, under "optimizer" in ckpt_<step>.pt.

Sharded, it is a folder beside that file.  Each rank writes its own share to ckpt_<step>.optim/rank_<r>_of_<N>.pt:
{"state": {parameter number in the state_dict: {"exp_avg": tensor, "exp_avg_sq": tensor}}}.  index.json lists the files:

    {"files": {"rank_0_of_4.pt": {"bytes": 1234, "parameters": [0, 5, …], "seal": "…"}, …}}

The folder is made under a temporary name and renamed.  ckpt_<step>.pt is renamed after it and so completes the
checkpoint; its "optimizer" holds {"folder": "ckpt_<step>.optim", "param_groups": […]}.
"""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import torch

from checkpoint.file import DamagedFile, check_sealed, read_file, seal_of, write_file
from checkpoint.pickle_reader import printable
from checkpoint.remote_folder import INDEX
from common.errors import UserError
from common.files import sync_folder, write_json
from optim.build import local_optimizer


def folder_of(checkpoint) -> Path:
    """ckpt_7.pt → ckpt_7.optim"""
    return Path(checkpoint).with_suffix(".optim")


def save_optimizer(checkpoint, optimizer, ranks) -> dict:
    """The value of "optimizer" in a checkpoint.  Sharded state is written here, so all ranks call this together.

    OSError on all ranks where one cannot write its share.
    """
    local = local_optimizer(optimizer)
    if local is optimizer:
        state = optimizer.state_dict()
        return {**state, "param_groups": readable_by_others(optimizer, state["param_groups"])}
    folder = folder_of(checkpoint)
    temporary = folder.with_name(f".{folder.name}.tmp")
    groups = numbered_groups(optimizer)
    file = temporary / f"rank_{ranks.rank}_of_{ranks.world_size}.pt"
    files = on_all_ranks(ranks, partial(write_share, file, optimizer, groups))
    on_all_ranks(ranks, partial(complete, temporary, dict(files), Path(checkpoint)) if ranks.first else lambda: None)
    return {"folder": folder.name, "param_groups": readable_by_others(optimizer, groups)}


def readable_by_others(optimizer, groups: list[dict]) -> list[dict]:
    """The groups with what the LAMBs of apex and of the reference trainer read from them: here it is always so."""
    always = {"bias_correction": True, "grad_averaging": True,
              "max_grad_norm": getattr(optimizer, "max_grad_norm", 1.0)}
    return [{**always, **group} for group in groups]


def numbered_groups(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The param_groups as a state_dict has them: parameters by number, counted through all groups."""
    groups, first = [], 0
    for group in optimizer.param_groups:
        groups.append({**group, "params": list(range(first, first + len(group["params"])))})
        first += len(group["params"])
    return groups


def write_share(file: Path, optimizer, groups: list[dict]) -> tuple[str, dict]:
    """Write the moments that this rank holds; returns the file's name and its entry in the index."""
    numbers = {parameter: number for group, numbered in zip(optimizer.param_groups, groups, strict=True)
               for parameter, number in zip(group["params"], numbered["params"], strict=True)}
    share = {numbers[parameter]: {key: value.detach().cpu() for key, value in moments.items()}
             for parameter, moments in local_optimizer(optimizer).state.items()}
    write_file(file, {"state": share})
    return file.name, {"bytes": file.stat().st_size, "parameters": list(share), "seal": seal_of(file)}


def seals_of(checkpoint, state) -> dict[str, str]:
    """file → seal of the sharded state that was just written; nothing where the state is in one piece."""
    if not isinstance(state, dict) or "folder" not in state:
        return {}
    files = json.loads((folder_named(checkpoint, state) / INDEX).read_text(encoding="utf-8"))["files"]
    return {name: entry["seal"] for name, entry in files.items()}


def on_all_ranks(ranks, action) -> list:
    """Call `action` on all ranks; returns the results of all of them.  OSError on all where one raised one."""
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
    """Write the index and rename the folder, after removing the checkpoint that it replaces."""
    for path in temporary.iterdir():
        if path.name not in files:
            path.unlink()  # left by a run that was killed
    for folder in checkpoint.parent.glob(".ckpt_*.optim.tmp"):
        if folder != temporary:
            shutil.rmtree(folder)  # left by one too
    write_json(temporary / INDEX, {"files": files})
    remove(checkpoint)
    os.replace(temporary, folder_of(checkpoint))
    sync_folder(checkpoint.parent)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint and its folder; the file first, because a checkpoint with a file counts as complete."""
    checkpoint.unlink(missing_ok=True)
    shutil.rmtree(folder_of(checkpoint), ignore_errors=True)


def set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint and its folder, so that no run reads them."""
    for path in (checkpoint, folder_of(checkpoint)):
        if path.exists():
            path.replace(f"{path}.set_aside")


def check_complete(checkpoint, state) -> None:
    """DamagedFile where the sharded state of a checkpoint is incomplete or damaged; `state` is its "optimizer".

    All its bytes are read, because a run must find a fault while it can still continue from another checkpoint.
    """
    if isinstance(state, dict) and "folder" in state:
        folder = folder_named(checkpoint, state)
        for name in sorted(set(read_index(folder).values())):
            check_sealed(folder / name)


def folder_named(checkpoint, state: dict) -> Path:
    """The folder that a checkpoint's "optimizer" names, beside the checkpoint."""
    return Path(checkpoint).parent / Path(str(state["folder"])).name


def read_index(folder: Path) -> dict[int, str]:
    """The file of each parameter's moments.  DamagedFile where the folder is incomplete."""
    try:
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry["bytes"]:
                raise DamagedFile(f"{folder / name}: has {size} bytes, its index says {entry['bytes']}")
        return {number: name for name, entry in files.items() for number in entry["parameters"]}
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename}: no such file: the checkpoint's optimizer state is incomplete") from None
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedFile(f"{folder / INDEX}: not a readable index: {printable(repr(error))}") from None


def read_moments(checkpoint, state: dict, numbers: list[int]) -> dict:
    """The moments of some parameters by number, from a checkpoint's "optimizer" or from its folder."""
    if "folder" not in state:
        if not isinstance(state.get("state"), dict):
            raise UserError(f"{checkpoint}: its optimizer does not hold state and param_groups")
        return state["state"]
    folder = folder_named(checkpoint, state)
    files = read_index(folder)
    missing = sorted(set(numbers) - set(files))
    if missing:
        raise UserError(f"{folder}: no optimizer state of parameter {missing[0]} in it ({len(missing)} are missing)")
    found = {}
    for name in sorted({files[number] for number in numbers}):
        share = read_file(folder / name).get("state")
        if not isinstance(share, dict):
            raise UserError(f"{folder / name}: holds no state")
        found |= {number: share[number] for number in numbers if number in share}
    return found
