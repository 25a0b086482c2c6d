"""Checkpoints: ckpt_<step>.pt files of plain tensors, written whole or not at all, the newest three kept.

The step in a name counts over both phases (phase 2 goes on from --phase1_end_step).  A file holds: model (the names of
modeling.py), optimizer (state and param_groups; optimizer_shards.py where it is sharded), step (of the phase), phase,
rows (how many rows of the phase's endless sequence are used up), data (its shards, and which are left out), skipped
(counts of steps), scaler (of --fp16), config (the architecture).  A folder that transformers loads is read as a
checkpoint of weights.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoint import file as checkpoint_file
from checkpoint import huggingface
from checkpoint import optimizer_shards as optimizer_state
from common.download import local_file
from common.errors import UserError
from optim.build import local_optimizer

KEPT = 3
FREE_TO_DIFFER = ("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range")  # no weight depends on it


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


def load_into(model, path) -> dict:
    """Load the weights of the checkpoint at `path`, a path or a URL; returns its contents."""
    state = load(local_file(path))
    check_architecture(model.config, state, path)
    load_model(model, state["model"], path)
    return state


def check_architecture(config, state: dict, path) -> None:
    """Shapes do not tell all (heads, activation): refuse a checkpoint that says it is of another architecture."""
    saved = state.get("config")
    for key, own in vars(config).items():
        value = saved.get(key, own) if isinstance(saved, dict) else own
        if isinstance(value, int | float | str) and value != own and key not in FREE_TO_DIFFER:
            raise UserError(f"{path}: {key} is {value!r} in it, {own!r} in the config")


def load_model(model, state_dict: dict, path) -> None:
    """Load weights by name.  Word embeddings of the unpadded vocabulary are padded with zeros first."""
    expected = model.state_dict()
    given = {str(name).removeprefix("_orig_mod.").removeprefix("module."): value for name, value in state_dict.items()}
    given = {name: padded_to(value, expected[name]) for name, value in given.items() if name in expected}
    missing = sorted(set(expected) - set(given))
    if missing:
        raise UserError(f"{path}: no weight {missing[0]} in it ({len(missing)} of {len(expected)} missing)")
    for name, value in given.items():
        check_tensor(value, expected[name].shape, f"{path}: {name}")
    model.load_state_dict(given, strict=True)


def padded_to(value, expected: torch.Tensor):
    """`value` with zero rows added where only the padding of the vocabulary (less than 8 rows) is missing."""
    if not is_plain(value) or value.dim() != expected.dim() or value.dim() == 0:
        return value
    missing = expected.shape[0] - value.shape[0]
    if 0 < missing < 8 and value.shape[1:] == expected.shape[1:]:
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value


def is_plain(value) -> bool:
    """Whether a value from a file is a tensor that weights and moments can be copied from."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu" \
        and value.is_floating_point()


def check_tensor(value, shape, what: str) -> None:
    """UserError where a value from a file is not a plain tensor of this shape."""
    if not is_plain(value):
        raise UserError(f"{what} is no plain tensor of floating-point numbers")
    if value.shape != shape:
        raise UserError(f"{what} has shape {tuple(value.shape)}, the config makes it {tuple(shape)}")


def load_optimizer(optimizer, state: dict, path) -> None:
    """Load moments and step count; the rate, decay and betas stay those of this run.

    `state` is laid out as NVLAMB's state_dict: moments by the number of the parameter, `step` in each group; or it
    names the folder of sharded moments in place of them.  In either case each rank loads those of its own share.
    """
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or len(groups) != len(optimizer.param_groups):
        raise UserError(f"{path}: its optimizer does not hold state and {len(optimizer.param_groups)} param_groups")
    local = local_optimizer(optimizer)
    share = {parameter for group in local.param_groups for parameter in group["params"]}
    numbered = []
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        numbers = group.get("params") if isinstance(group, dict) else None
        if not isinstance(numbers, list) or [type(number) for number in numbers] != [int] * len(own["params"]):
            raise UserError(f"{path}: its optimizer has another group than the {len(own['params'])} parameters "
                            f"with weight decay {own['weight_decay']}")
        numbered += [pair for pair in zip(numbers, own["params"], strict=True) if pair[1] in share]
        own["step"] = whole_number(group, "step", f"{path}: optimizer")
    for own, local_group in zip(optimizer.param_groups, local.param_groups, strict=True):
        local_group["step"] = own["step"]
    moments = optimizer_state.moments(path, state, [number for number, _ in numbered])
    for number, parameter in numbered:
        local.state[parameter] = moments_for(parameter, moments.get(number), f"{path}: optimizer, {number}")


def moments_for(parameter, given, what: str) -> dict[str, torch.Tensor]:
    """Both moments of a parameter, checked, on its device and in its type; none where none were saved."""
    if given is None:
        return {}
    moments = {key: given.get(key) if isinstance(given, dict) else None for key in ("exp_avg", "exp_avg_sq")}
    for key, value in moments.items():
        moments[key] = padded_to(value, parameter)
        check_tensor(moments[key], parameter.shape, f"{what}, {key},")
    return {key: value.to(parameter.device, parameter.dtype, copy=True).contiguous() for key, value in moments.items()}


def whole_number(values: dict, key: str, what: str, default: int = 0) -> int:
    """A count from a file; UserError where it is none."""
    value = values.get(key, default)
    if isinstance(value, torch.Tensor) and value.numel() == 1 and is_plain(value):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not 0 <= value < 2**63:
        raise UserError(f"{what}: {key} is {str(value)[:50]}, not a whole number of at least 0")
    return value


def dictionary(state: dict, key: str, path) -> dict:
    """A dictionary in a file, empty where it is not there; UserError where it is something else."""
    value = state.get(key, {})
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is no dictionary")
    return value


@dataclass(frozen=True)
class Start:
    """Where a run starts: at a step of its phase, with so many rows of the phase used up, from a checkpoint or none."""

    step: int = 0
    rows: int = 0
    path: Path | None = None
    state: dict | None = None  # its "optimizer" may be None: weights alone
    data: dict | None = None  # of the stream that goes on (dataset.BatchStream.state)
    skipped: dict = field(default_factory=dict)  # counts of skipped steps (optimizers.SKIP_COUNTS)
    scaler: dict = field(default_factory=dict)  # loss scale (mixed_precision.Precision.state)


def find_start(args, report) -> Start:
    """What the flags and the checkpoints in --output_dir make the run start from (SPEC: phases and resuming).

    Without --resume_from_checkpoint the folder may hold none.  In phase 2 the newest number decides: phase 1's last
    starts the phase, a higher one resumes it, a lower one is an error.
    """
    present = steps(args.output_dir)
    if present and not args.resume_from_checkpoint:
        raise UserError(f"--output_dir {args.output_dir}: holds ckpt_{present[-1]}.pt already; "
                        f"go on from it with --resume_from_checkpoint, or name another folder")
    if present:
        return start_from(args, *resumed_checkpoint(args, report), report)
    if args.phase2:
        raise UserError(f"--output_dir {args.output_dir}: no checkpoint in it; "
                        f"--phase2 goes on from ckpt_{args.phase1_end_step}.pt")
    if args.init_checkpoint:
        state = load(local_file(args.init_checkpoint))
        state["optimizer"] = with_step_zero(state, args.init_checkpoint) if args.resume_from_checkpoint else None
        return Start(path=args.init_checkpoint, state=state)
    if args.resume_from_checkpoint:
        report(f"no checkpoint in {args.output_dir} to resume from: starting at step 0")
    return Start()


def resumed_checkpoint(args, report) -> tuple[int, dict]:
    if args.resume_step == -1:
        return newest(args.output_dir, report)
    return args.resume_step, load_whole(path_of(args.output_dir, args.resume_step))


def start_from(args, number: int, state: dict, report) -> Start:
    """The start that ckpt_<number>.pt gives in the phase of this run."""
    path = path_of(args.output_dir, number)
    if args.phase2 and number < args.phase1_end_step:
        raise UserError(f"{path}: below --phase1_end_step {args.phase1_end_step}: phase 1 is not finished")
    if args.phase2 and number == args.phase1_end_step:
        state["optimizer"] = with_step_zero(state, path)
        return Start(path=path, state=state)
    phase = 2 if args.phase2 else 1
    if whole_number(state, "phase", path, phase) != phase:
        raise UserError(f"{path}: was written in phase {state['phase']}, this run is phase {phase} (--phase2)")
    step = number - args.phase1_end_step if args.phase2 else number
    if whole_number(state, "step", path, step) != step:
        raise UserError(f"{path}: holds step {state['step']} of its phase, but its name says {step}")
    if "rows" not in state:
        report(f"{path} does not say how far it got in the data: from the first row on")
    skipped, scaler = (dictionary(state, key, path) for key in ("skipped", "scaler"))
    return Start(step=step, rows=whole_number(state, "rows", path), path=path, state=state,
                 data=stream_state(state, path), scaler=scaler,
                 skipped={name: whole_number(skipped, name, path) for name in skipped})


def stream_state(state: dict, path) -> dict | None:
    """What the stream left in a checkpoint, checked: {"shards": {name: rows}, "left_out": {name: [epoch, rows]}}."""
    if "data" not in state:
        return None
    what = f"{path}: what it says about the shards"
    data = dictionary(state, "data", path)
    shards, left_out = (dictionary(data, key, what) for key in ("shards", "left_out"))
    try:
        places = {name: {"epoch": epoch, "rows": rows} for name, (epoch, rows) in left_out.items()}
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} cannot be read: {error!r}") from None
    return {"shards": {str(name): whole_number(shards, name, what) for name in shards},
            "left_out": {str(name): [whole_number(place, key, what) for key in ("epoch", "rows")]
                         for name, place in places.items() if name in shards}}


def with_step_zero(state: dict, path) -> dict | None:
    """The optimizer of a checkpoint, its moments kept, its steps counted anew: how phase 2 starts."""
    optimizer = state.get("optimizer")
    if optimizer is None:
        return None
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("param_groups"), list) \
            or not all(isinstance(group, dict) for group in optimizer["param_groups"]):
        raise UserError(f"{path}: its optimizer does not hold param_groups")
    return {**optimizer, "param_groups": [{**group, "step": 0} for group in optimizer["param_groups"]]}
