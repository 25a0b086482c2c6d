"""A crash test: kill a training at random moments, restart it, and compare it with an undisturbed one.

It runs run_pretraining.py on a small scale through both phases, on unpacked and packed data in turn.  Each run is
killed while it starts, during its steps, or while a checkpoint is being written, and restarted until it is done.  Then
every logged step must have exactly the numbers of the undisturbed run, and the last checkpoint exactly its weights; no
checkpoint may have been lost at any time.

After SIGTERM a run must save the current step and exit with 0.  With several ranks, one of them or all at once are
killed; the optimizer state is sharded over the ranks where the data is packed.

With --object_storage the killed runs read their data from an S3 server of this machine (moto's) and keep their
checkpoints there, and each start finds an empty disk; the undisturbed ones use folders.  What was said to be saved must
be there, each checkpoint whole, and no upload may be left half done in the end.

    python tools/torture.py --kills 50
    python tools/torture.py --kills 20 --signal SIGTERM
    python tools/torture.py --kills 20 --ranks 2
    python tools/torture.py --kills 20 --object_storage
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm  # noqa: E402

from common import cli  # noqa: E402
from common.errors import UserError  # noqa: E402

FORMS = ("unpacked", "packed")
LENGTHS = {1: 24, 2: 32}  # tokens, by phase
STEPS = {1: 17, 2: 13}
PREDICTIONS = 4
COMPARED = ("step_loss", "step_mean_loss", "average_loss", "mlm_loss", "nsp_loss", "learning_rate", "gradient_norm",
            "skipped_steps")
COLLECTIVE_TIMEOUT = 30  # seconds that a rank waits for one that was killed before it connected
LONGEST_RUN = 300.0  # seconds; a longer run is a hang
STORE = "s3://data"
ARRIVAL_SECONDS = 0.3  # in which the store has done what a killed run had asked of it


class TestFailure(UserError):
    """A run hung, failed without having been killed, or left processes behind."""


@dataclass
class Tally:
    """Counts of what happened so far."""

    kills: int = 0
    while_saving: int = 0
    resumes: int = 0
    runs_compared: int = 0
    steps_compared: int = 0
    mismatches: int = 0
    checkpoints_lost: int = 0
    uploads_left: int = 0  # trainings that left uploads half done
    problems: list[str] = field(default_factory=list)


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=cli.positive_int, default=50, help="number of kills")
    parser.add_argument("--signal", choices=("SIGKILL", "SIGTERM"), default="SIGKILL", help="signal to kill with")
    parser.add_argument("--ranks", type=cli.positive_int, default=1, help="ranks of a training")
    parser.add_argument("--object_storage", action="store_true",
                        help="data and checkpoints in object storage, an empty disk for each start")
    parser.add_argument("--seed", type=cli.whole, default=0, help="random seed of the moments")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args(argv)
    from tests.support.object_store import s3_server

    with tempfile.TemporaryDirectory() as folder, s3_server() if args.object_storage else nullcontext(), \
            patch.dict(os.environ):
        if args.object_storage:
            os.environ["BERT_CACHE_DIR"] = str(Path(folder) / "copies")  # of what is checked here
        tally = Torturer(Path(folder), args).run()
    print(json.dumps(vars(tally)) if args.json else summarize(tally, args))
    if tally.mismatches or tally.checkpoints_lost or tally.uploads_left:
        raise UserError("a training that was killed differs from the undisturbed one: see above")


def summarize(tally: Tally, args) -> str:
    return "\n".join([f"{tally.kills} kills by {args.signal}, {tally.while_saving} of them while a checkpoint was "
                      f"being written; {tally.resumes} resumes; {tally.runs_compared} trainings of two phases on "
                      f"{args.ranks} rank(s) compared",
                      f"{tally.steps_compared} steps compared, {tally.mismatches} mismatches; "
                      f"{tally.checkpoints_lost} checkpoints lost", *tally.problems])


@dataclass(frozen=True)
class Place:
    """Where the runs of one training write: logs and checkpoints to a folder, or checkpoints to object storage."""

    logs: Path
    in_store: bool = False

    @property
    def name(self) -> str:
        return self.logs.name

    @property
    def output_dir(self) -> str:
        return f"{STORE}/{self.name}" if self.in_store else str(self.logs)

    @property
    def disk(self) -> Path:
        """The cache folder of its runs, of which the store's are to find only the compiled kernels."""
        return self.logs.with_name("disk")

    def checkpoints(self):
        """The folder of its checkpoints, for the functions of checkpoint/folder.py."""
        from checkpoint.folder import open_folder

        return open_folder(self.output_dir)

    def is_saving(self, since: float) -> bool:
        """Whether a checkpoint is being written, by a run that was started then, or uploaded."""
        with suppress(FileNotFoundError):  # it has just been renamed
            if self.in_store:
                written = list(self.disk.glob("outputs/*/ckpt_*.pt"))
                return any(self.disk.glob("outputs/*/.ckpt_*.tmp")) or any(
                    not path.with_name(f".{path.name}.etag").exists() for path in written)
            return any(path.stat().st_mtime > since for path in self.logs.glob(".ckpt_*.tmp"))
        return False


class Torturer:
    """Kills trainings until there were `args.kills` kills, and lets the last training end."""

    def __init__(self, folder: Path, args):
        self.folder = folder
        self.kills = args.kills
        self.signal = signal.Signals[args.signal]
        self.ranks = args.ranks
        self.in_store = args.object_storage
        self.rng = random.Random(args.seed)
        self.tally = Tally()
        self.bar = tqdm(total=args.kills, unit="kill", disable=None)

    def run(self) -> Tally:
        prepare(self.folder, self.in_store)
        peaceful = {}
        with self.bar:
            while self.tally.kills < self.kills:
                form = FORMS[self.tally.runs_compared % len(FORMS)]
                if form not in peaceful:
                    peaceful[form] = self.undisturbed(form)
                place = Place(self.folder / f"disturbed_{self.tally.runs_compared}", self.in_store)
                for phase in LENGTHS:
                    self.disturb(place, form, phase)
                compare_with_undisturbed(peaceful[form], place, self.tally)
        return self.tally

    def undisturbed(self, form: str) -> Place:
        place = Place(self.folder / f"peaceful_{form}")
        for phase in LENGTHS:
            codes = TrainingProcesses(self.folder, place, form, phase, self.ranks).wait()
            if any(codes):
                raise TestFailure(f"an undisturbed run ended with {codes}: {last_words(self.folder)}")
        return place

    def disturb(self, place: Place, form: str, phase: int) -> None:
        """One phase, killed and restarted until it is done; after the last kill it runs undisturbed."""
        before = None
        while not finished(place, phase):
            self.tally.resumes += before is not None
            before = whole_checkpoints(place)
            run = TrainingProcesses(self.folder, place, form, phase, self.ranks)
            killed = self.tally.kills < self.kills and self.kill(run, place)
            codes = run.wait()
            check_checkpoints(place, before, announced(run.console()), self.tally)
            check_ending(codes, -self.signal if killed else 0, f"{place.name}, phase {phase}", last_words(self.folder))
            if killed and self.signal == signal.SIGTERM and not any(codes):
                check_saved(place, phase, self.tally)
            elif not killed and not finished(place, phase):
                raise TestFailure(f"a run ended without an error, but not at its last step: {last_words(self.folder)}")

    def kill(self, run: "TrainingProcesses", place: Place) -> bool:
        """Kill a run at a random moment; False where it ended before."""
        wait_for_moment(run, place, self.rng)
        if not run.is_running():
            return False
        saving = place.is_saving(run.started)
        run.send(self.signal, self.rng)
        self.tally.kills += 1
        self.tally.while_saving += saving
        self.bar.update()
        return True


# --- runs ---

def prepare(folder: Path, in_store: bool) -> None:
    """A config, and shards of both phases in both forms, in folders and in the store."""
    import pack_pretraining_data_pytorch as packer
    from data.upload import upload_set
    from tests.support import samples

    samples.write_config(folder / "config.json")
    for phase, length in LENGTHS.items():
        samples.write_dataset(folder / f"unpacked_{phase}", (7, 13, 5), seed=phase, sequence_length=length)
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            packer.main([f"--input_dir={folder / f'unpacked_{phase}'}", f"--output_dir={folder / f'packed_{phase}'}",
                         f"--max_sequence_length={length}", f"--max_predictions_per_sequence={PREDICTIONS}"])
            for form in FORMS if in_store else ():
                upload_set(folder / f"{form}_{phase}", f"{STORE}/{form}_{phase}", overwrite=False, show_progress=False)


def command(folder: Path, place: Place, form: str, phase: int, sharded: bool) -> list[str]:
    values = {"config_file": folder / "config.json", "output_dir": place.output_dir,
              "input_dir": f"{STORE if place.in_store else folder}/{form}_{phase}",
              "max_seq_length": LENGTHS[phase], "max_predictions_per_seq": PREDICTIONS, "train_batch_size": 8,
              "gradient_accumulation_steps": 2, "max_steps": STEPS[phase], "warmup_proportion": 0.3,
              "learning_rate": 0.01, "num_steps_per_checkpoint": 2, "phase1_end_step": STEPS[1],
              "use_zero_optimizer": sharded, "collective_timeout": COLLECTIVE_TIMEOUT,
              "json_summary": place.logs / f"log_{phase}.json"}
    switches = ["do_train", "no_cuda", "resume_from_checkpoint", *(["phase2"] if phase == 2 else [])]
    return [sys.executable, str(ROOT / "run_pretraining.py"), *(f"--{name}" for name in switches),
            *(f"--{name}={value}" for name, value in values.items())]


class TrainingProcesses:
    """The processes of one training, which find an empty disk where they keep everything in the store."""

    def __init__(self, folder: Path, place: Place, form: str, phase: int, ranks: int):
        from tests.support.ranks import free_port

        words = command(folder, place, form, phase, sharded=ranks > 1 and form == "packed")
        variables = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        for name in ("outputs", "shards"):
            shutil.rmtree(place.disk / name, ignore_errors=True)
        place.logs.mkdir(exist_ok=True)
        self.processes = []
        self.started = time.time()
        self.output = folder / "output.txt"
        self.begin = self.output.stat().st_size if self.output.exists() else 0
        with open(self.output, "ab") as console:
            for rank in map(str, range(ranks)):
                own = {**variables, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1",
                       **({"BERT_CACHE_DIR": str(place.disk)} if place.in_store else {})}
                self.processes.append(subprocess.Popen(words, stdout=console, stderr=console, start_new_session=True,
                                                       env={**os.environ, **own}))

    def console(self) -> str:
        """What these processes have printed."""
        return self.output.read_bytes()[self.begin:].decode("utf-8", "replace")

    def is_running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def send(self, number: signal.Signals, rng: random.Random) -> None:
        """Send a signal to one process; in half of all cases a SIGKILL to all of them, as in a power failure."""
        all_of_them = number == signal.SIGKILL and rng.random() < 0.5
        for process in self.processes if all_of_them else [rng.choice(self.processes)]:
            process.send_signal(number)

    def wait(self) -> list[int]:
        """The exit codes of all processes, after their own children have ended too."""
        try:
            codes = [process.wait(LONGEST_RUN) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise TestFailure(f"a run did not end within {LONGEST_RUN:.0f} seconds") from None
        for process in self.processes:
            wait_for_children(process)
        return codes


def wait_for_moment(run: TrainingProcesses, place: Place, rng: random.Random) -> None:
    """Return at a random moment of the run, or when it has ended."""
    moment = rng.choice(("starting", "stepping", "saving"))
    if moment == "starting":
        wait_until(run, time.monotonic() + rng.uniform(0.0, 4.0))
    elif moment == "stepping":
        lines = rng.randint(1, 12)
        enough = count_lines(place) + lines
        wait_until(run, condition=lambda: count_lines(place) >= enough)
        wait_until(run, time.monotonic() + rng.uniform(0.0, 0.1))
    else:
        for _ in range(rng.randint(1, 3)):
            wait_until(run, condition=lambda: place.is_saving(run.started))
            wait_until(run, time.monotonic() + rng.uniform(0.0, 0.02))


def wait_until(run: TrainingProcesses, moment: float = float("inf"), condition=lambda: False) -> None:
    while run.is_running() and time.monotonic() < moment and not condition():
        time.sleep(0.0005)


def wait_for_children(process: subprocess.Popen) -> None:
    """Wait until the children of a killed process have ended."""
    give_up = time.monotonic() + 30.0
    while time.monotonic() < give_up:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise TestFailure("30 seconds after a run was killed, a process of it was still there")


def last_words(folder: Path) -> str:
    return (folder / "output.txt").read_text(encoding="utf-8", errors="replace")[-2000:]


# --- checks of what the runs leave ---

def finished(place: Place, phase: int) -> bool:
    """Whether the last checkpoint of a phase exists."""
    from checkpoint.folder import saved_steps

    return sum(STEPS[number] for number in range(1, phase + 1)) in saved_steps(place.checkpoints())


def check_ending(codes: list[int], expected: int, where: str, words: str) -> None:
    """Check the exit codes.  An undisturbed run ends with 0.  Of a killed run, either some rank ends by the signal and
    the others with an error, or, where it could still save, all end with 0."""
    if any(codes) and (not expected or expected not in codes):
        raise TestFailure(f"{where} ended with {codes}: {words}")


def check_saved(place: Place, phase: int, tally: Tally) -> None:
    """Check that a run that was asked to stop has a checkpoint of the last step that it logged."""
    from checkpoint.folder import saved_steps

    last = max((step for of_phase, step in dict(logged_figures(place)) if of_phase == phase), default=0)
    number = last + (STEPS[1] if phase == 2 else 0)
    if last and number not in saved_steps(place.checkpoints()):
        tally.checkpoints_lost += 1
        tally.problems.append(f"{place.name}: stopped after step {last} of phase {phase} without a checkpoint of it")


def whole_checkpoints(place: Place) -> list[int]:
    """The steps of the checkpoints that can be read."""
    from checkpoint.folder import read_complete, saved_steps
    from common.errors import UserError

    whole, folder = [], place.checkpoints()
    for step in saved_steps(folder):
        try:
            read_complete(folder, step)
            whole.append(step)
        except UserError:
            continue
    return whole


def announced(console: str) -> list[int]:
    """The steps of the checkpoints that a run said were in the store."""
    return [int(step) for step in re.findall(rf"saved {STORE}/\S*ckpt_(\d+)\.pt", console)]


def check_checkpoints(place: Place, before: list[int], said: list[int], tally: Tally) -> None:
    """Check that there are as many checkpoints as before, up to three, none damaged, and the newest no older than that
    of before, and than what the run `said` was saved."""
    from checkpoint.folder import saved_steps

    time.sleep(ARRIVAL_SECONDS if place.in_store else 0.0)
    now, named = whole_checkpoints(place), saved_steps(place.checkpoints())
    fewer = len(now) < min(3, len(before)) or (STEPS[1] in before and STEPS[1] not in now)
    if now != named or fewer or max(now, default=0) < max([*before, *said], default=0):
        tally.checkpoints_lost += 1
        tally.problems.append(f"{place.name}: checkpoints {before}, and saved {said}, became {named}, of which {now} "
                              "can be read")


def logged_figures(place: Place) -> list[tuple[tuple[int, int], dict]]:
    """((phase, step), its COMPARED figures) of each logged step.  A kill may have truncated a line."""
    found = []
    for phase in LENGTHS:
        path = place.logs / f"log_{phase}.json"
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text.removeprefix("DLLL "))
            except json.JSONDecodeError:
                continue
            if "step_loss" in line["data"]:
                found.append(((phase, line["step"][1]), {key: line["data"][key] for key in COMPARED}))
    return found


def count_lines(place: Place) -> int:
    return len(logged_figures(place))


def compare_with_undisturbed(peaceful: Place, disturbed: Place, tally: Tally) -> None:
    """Compare every logged step and the final weights with those of the undisturbed run."""
    import torch

    from checkpoint.folder import read_complete

    expected, found = dict(logged_figures(peaceful)), logged_figures(disturbed)
    for at, figures in found:
        tally.steps_compared += 1
        if figures != expected[at]:
            tally.mismatches += 1
            tally.problems.append(f"{disturbed.name}, phase {at[0]} step {at[1]}: {figures}, not {expected[at]}")
    for phase, step in sorted(set(expected) - {at for at, _ in found}):
        tally.mismatches += 1
        tally.problems.append(f"{disturbed.name}: no log line of phase {phase} step {step}")
    ours, theirs = (read_complete(place.checkpoints(), sum(STEPS.values()))["model"] for place in (disturbed, peaceful))
    if any(not torch.equal(ours[name], theirs[name]) for name in theirs):
        tally.mismatches += 1
        tally.problems.append(f"{disturbed.name}: other weights at the end")
    if disturbed.in_store and disturbed.checkpoints().store.end_abandoned_uploads():
        tally.problems.append(f"{disturbed.name}: uploads were left half done")
        tally.uploads_left += 1
    tally.runs_compared += 1


if __name__ == "__main__":
    cli.run(main)
