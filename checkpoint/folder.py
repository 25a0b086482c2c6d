"""The checkpoints of a folder: ckpt_<step>.pt, written whole or not at all, the newest three kept.

The step in a name counts over both phases.  A Hugging Face model folder is read as a checkpoint of weights.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from checkpoint import huggingface, optimizer_shards
from checkpoint.file import WAY_OUT, DamagedFile, kind_of, read_file, write_file
from checkpoint.remote_folder import RemoteFolder, steps_in
from checkpoint.rotation import superseded
from common.errors import UserError
from common.object_store import is_s3


def open_folder(name: str) -> Path | RemoteFolder:
    """The folder of this path or s3:// URL."""
    return RemoteFolder(name) if is_s3(name) else Path(name)


def checkpoint_path(folder, step: int) -> Path:
    return Path(folder) / f"ckpt_{step}.pt"


def saved_steps(folder) -> list[int]:
    """The steps of the checkpoints in a folder, ascending; none where there is no folder."""
    if isinstance(folder, RemoteFolder):
        return folder.steps()
    return steps_in(path.name for path in Path(folder).glob("ckpt_*.pt"))


def newest_name(folder) -> str:
    """The checkpoint with the highest step in a folder, as a message names it; "none" where there is none."""
    steps = saved_steps(folder)
    return f"{folder}/ckpt_{steps[-1]}.pt" if steps else "none"


def write_checkpoint(folder, step: int, contents: dict, protected: Collection[int] = ()) -> Path:
    """Write ckpt_<step>.pt; when it is on disk, remove all but the newest three, and never the steps `protected`.

    Newer checkpoints, from which the run was not resumed, become ckpt_<step>.pt.set_aside, so that no later run takes
    them for its newest.
    """
    path = checkpoint_path(folder, step)
    write_file(path, contents)
    if isinstance(folder, RemoteFolder):
        folder.publish(step, protected, optimizer_shards.seals_of(path, contents.get("optimizer")))
        return path
    newer, older = superseded(saved_steps(folder), step, protected)
    for one in newer:
        optimizer_shards.set_aside(checkpoint_path(folder, one))
    for one in older:
        optimizer_shards.remove(checkpoint_path(folder, one))
    return path


def read_checkpoint(path) -> dict:
    """The contents of a checkpoint, on the host."""
    if Path(path).is_dir():
        return huggingface.read_folder(path)
    if Path(path).suffix == ".safetensors":
        raise UserError(f"{path}: name the folder that it lies in, which says the architecture")
    contents = read_file(path)
    contents.pop(huggingface.FRESH, None)  # of folders only
    if not isinstance(contents.get("model"), dict):
        held = f"its model is {kind_of(contents['model'])}, no dictionary of weights" if "model" in contents else \
            "it holds no model"
        raise UserError(f"{path}: not a checkpoint: {held}; {WAY_OUT}")
    return contents


def read_complete(folder, step: int) -> dict:
    """The same of a step, to resume from: the folder of sharded optimizer state, if any, must be complete."""
    path = checkpoint_path(folder, step)
    if isinstance(folder, RemoteFolder):
        folder.fetch(step)
    contents = read_checkpoint(path)
    optimizer_shards.check_complete(path, contents.get("optimizer"))
    return contents


def newest_readable(folder, warn: Callable[[str], None], to_resume: bool = True) -> tuple[int, dict]:
    """The newest checkpoint that is not damaged, as (step in its name, contents); `warn` gets the damaged ones.

    It is for a run to resume from, or for another command's --checkpoint.

    UserError where all are damaged, because whether to start again is the user's decision; and where one cannot be read
    for another reason, because then it may hold what the user wants to go on from.
    """
    steps = saved_steps(folder)
    for step in reversed(steps):
        try:
            return step, read_complete(folder, step)
        except DamagedFile as error:
            warn(f"skipped a damaged checkpoint: {error}")
        except UserError as error:
            before = max((older for older in steps if older < step), default=None)
            way_out = "" if before is None else f"; --resume_step {before} goes on from the one before" if to_resume \
                else f"; {checkpoint_path(folder, before)} is the one before"
            raise UserError(f"{error}{way_out}") from None
    none_left = f"{folder}: none of its {len(steps)} checkpoints can be read"
    raise UserError(f"--output_dir {none_left}; move them away to start again" if to_resume
                    else f"--checkpoint {none_left}")
