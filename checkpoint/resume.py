"""Where a run starts: at step 0, from other weights, or from a checkpoint of its own folder."""

from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.file import dictionary, whole_number
from checkpoint.folder import load, load_whole, newest, path_of, steps
from common.download import local_file
from common.errors import UserError


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
