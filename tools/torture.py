"""Kill a training again and again at random moments, and compare it with one that was left in peace.

Small runs of run_pretraining.py through both phases, on unpacked and on packed data in turn.  Each is killed while it
starts, anywhere in its steps, or while a checkpoint is being written, and started again, until it is done.  Then every
logged step must have the very numbers of the undisturbed run, the last checkpoint its very weights, and at no time may
a checkpoint have been lost.

    python tools/torture.py --kills 50
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tqdm import tqdm  # noqa: E402

import cli  # noqa: E402

FORMS = ("unpacked", "packed")
LENGTHS = {1: 24, 2: 32}  # tokens, by phase
STEPS = {1: 17, 2: 13}
PREDICTIONS = 4
COMPARED = ("step_loss", "average_loss", "mlm_loss", "nsp_loss", "learning_rate", "gradient_norm", "skipped_steps")
LONGEST_RUN = 300.0  # seconds without an end: a hang


class Broken(Exception):
    """A run did what it must never do."""


@dataclass
class Tally:
    """What happened so far."""

    kills: int = 0
    while_saving: int = 0
    resumes: int = 0
    runs_compared: int = 0
    steps_compared: int = 0
    mismatches: int = 0
    checkpoints_lost: int = 0
    problems: list[str] = field(default_factory=list)


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=cli.positive_int, default=50, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        tally = torture(Path(folder), args.kills, random.Random(args.seed))
    print(json.dumps(vars(tally)) if args.json else describe(tally))
    if tally.mismatches or tally.checkpoints_lost:
        raise cli.UserError("a training that was killed is not the one that was not: see above")


def describe(tally: Tally) -> str:
    return "\n".join([f"{tally.kills} kills, {tally.while_saving} of them while a checkpoint was being written; "
                      f"{tally.resumes} resumes; {tally.runs_compared} trainings of two phases compared",
                      f"{tally.steps_compared} steps compared, {tally.mismatches} mismatches; "
                      f"{tally.checkpoints_lost} checkpoints lost", *tally.problems])


def torture(folder: Path, kills: int, rng: random.Random) -> Tally:
    """Disturb trainings until there were so many kills, and one more to its end."""
    prepare(folder)
    peaceful = {form: undisturbed(folder, form) for form in FORMS}
    tally = Tally()
    with tqdm(total=kills, unit="kill", disable=None) as bar:
        while tally.kills < kills:
            form = FORMS[tally.runs_compared % len(FORMS)]
            output = folder / f"disturbed_{tally.runs_compared}"
            for phase in LENGTHS:
                disturb(folder, output, form, phase, kills, rng, tally, bar)
            compare(peaceful[form], output, tally)
    return tally


# --- runs ---

def prepare(folder: Path) -> None:
    """A config, and shards of both phases in both forms."""
    import pack_pretraining_data_pytorch as packer
    import samples

    samples.write_config(folder / "config.json")
    for phase, length in LENGTHS.items():
        samples.write_dataset(folder / f"unpacked_{phase}", (7, 13, 5), seed=phase, sequence_length=length)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            packer.main([f"--input_dir={folder / f'unpacked_{phase}'}", f"--output_dir={folder / f'packed_{phase}'}",
                         f"--max_sequence_length={length}", f"--max_predictions_per_sequence={PREDICTIONS}"])


def command(folder: Path, output: Path, form: str, phase: int) -> list[str]:
    values = {"config_file": folder / "config.json", "input_dir": folder / f"{form}_{phase}", "output_dir": output,
              "max_seq_length": LENGTHS[phase], "max_predictions_per_seq": PREDICTIONS, "train_batch_size": 8,
              "gradient_accumulation_steps": 2, "max_steps": STEPS[phase], "warmup_proportion": 0.3,
              "learning_rate": 0.01, "num_steps_per_checkpoint": 2, "phase1_end_step": STEPS[1],
              "json_summary": output / f"log_{phase}.json"}
    switches = ["do_train", "no_cuda", "resume_from_checkpoint", *(["phase2"] if phase == 2 else [])]
    return [sys.executable, str(ROOT / "run_pretraining.py"), *(f"--{name}" for name in switches),
            *(f"--{name}={value}" for name, value in values.items())]


def start(folder: Path, output: Path, form: str, phase: int) -> subprocess.Popen:
    with open(folder / "output.txt", "ab") as console:
        return subprocess.Popen(command(folder, output, form, phase), stdout=console, stderr=console,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def undisturbed(folder: Path, form: str) -> Path:
    output = folder / f"peaceful_{form}"
    for phase in LENGTHS:
        run = start(folder, output, form, phase)
        if run.wait(LONGEST_RUN):
            raise Broken(f"an undisturbed run ended with {run.returncode}: {last_words(folder)}")
    return output


def disturb(folder, output, form, phase, kills, rng, tally, bar) -> None:
    """One phase, killed and started again until it is done; once there were enough kills, it is left in peace."""
    started = False
    while True:
        before = whole_checkpoints(output)
        run = start(folder, output, form, phase)
        tally.resumes += started
        started = True
        if tally.kills < kills:
            wait_for_moment(run, output, rng)
            if run.poll() is None:
                run.send_signal(signal.SIGKILL)
                tally.kills += 1
                bar.update()
                tally.while_saving += any(output.glob(".ckpt_*.tmp"))
        code = run.wait(LONGEST_RUN)
        wait_for_children(run)
        check_checkpoints(output, before, tally)
        if code == 0:
            return
        if code != -signal.SIGKILL:
            raise Broken(f"a run ended with {code}: {last_words(folder)}")


def wait_for_moment(run: subprocess.Popen, output: Path, rng: random.Random) -> None:
    """Return at a random moment of the run, or when it has ended."""
    place = rng.choice(("starting", "stepping", "saving"))
    if place == "starting":
        wait_until(run, time.monotonic() + rng.uniform(0.0, 4.0))
    elif place == "stepping":
        lines = rng.randint(1, 12)
        enough = count_lines(output) + lines
        wait_until(run, condition=lambda: count_lines(output) >= enough)
        wait_until(run, time.monotonic() + rng.uniform(0.0, 0.1))
    else:
        for _ in range(rng.randint(1, 3)):
            wait_until(run, condition=lambda: any(output.glob(".ckpt_*.tmp")))
            wait_until(run, time.monotonic() + rng.uniform(0.0, 0.02))


def wait_until(run, moment: float = float("inf"), condition=lambda: False) -> None:
    while run.poll() is None and time.monotonic() < moment and not condition():
        time.sleep(0.0005)


def wait_for_children(run: subprocess.Popen) -> None:
    """No process of a killed run may stay behind."""
    give_up = time.monotonic() + 30.0
    while time.monotonic() < give_up:
        try:
            os.killpg(run.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise Broken("30 seconds after a run was killed, a process of it was still there")


def last_words(folder: Path) -> str:
    return (folder / "output.txt").read_text(errors="replace")[-2000:]


# --- what they leave ---

def whole_checkpoints(output: Path) -> list[int]:
    """The steps of the checkpoints that can be read."""
    import checkpoint
    from cli import UserError

    whole = []
    for step in checkpoint.steps(output):
        try:
            checkpoint.load(checkpoint.path_of(output, step))
            whole.append(step)
        except UserError:
            continue
    return whole


def check_checkpoints(output: Path, before: list[int], tally: Tally) -> None:
    """There must be as many checkpoints as before, up to three, none of them damaged, and the newest no older."""
    import checkpoint

    now, named = whole_checkpoints(output), checkpoint.steps(output)
    fewer = len(now) < min(3, len(before)) or (STEPS[1] in before and STEPS[1] not in now)
    if now != named or fewer or max(now, default=0) < max(before, default=0):
        tally.checkpoints_lost += 1
        tally.problems.append(f"{output.name}: checkpoints {before} became {named}, of which {now} can be read")


def log_lines(output: Path) -> list[tuple[tuple[int, int], dict]]:
    """((phase, step), what of its figures is compared) of each logged step.  A line may have been cut by a kill."""
    found = []
    for phase in LENGTHS:
        path = output / f"log_{phase}.json"
        for text in path.read_text().splitlines() if path.exists() else ():
            try:
                line = json.loads(text.removeprefix("DLLL "))
            except json.JSONDecodeError:
                continue
            if "step_loss" in line["data"]:
                found.append(((phase, line["step"][1]), {key: line["data"][key] for key in COMPARED}))
    return found


def count_lines(output: Path) -> int:
    return len(log_lines(output))


def compare(peaceful: Path, output: Path, tally: Tally) -> None:
    """Every logged step against the undisturbed run's, and the weights at the end."""
    import torch

    import checkpoint

    expected, found = dict(log_lines(peaceful)), log_lines(output)
    for place, figures in found:
        tally.steps_compared += 1
        if figures != expected[place]:
            tally.mismatches += 1
            tally.problems.append(f"{output.name}, phase {place[0]} step {place[1]}: {figures}, not {expected[place]}")
    for phase, step in sorted(set(expected) - {place for place, _ in found}):
        tally.mismatches += 1
        tally.problems.append(f"{output.name}: no log line of phase {phase} step {step}")
    last = checkpoint.path_of(output, sum(STEPS.values()))
    ours, theirs = (checkpoint.load(path)["model"] for path in (last, peaceful / last.name))
    if any(not torch.equal(ours[name], theirs[name]) for name in theirs):
        tally.mismatches += 1
        tally.problems.append(f"{output.name}: other weights at the end")
    tally.runs_compared += 1


if __name__ == "__main__":
    cli.run(main)
