"""Give the training command thousands of malformed inputs, and check that it refuses each in one line.

Hypothesis damages configs, op lists, metadata, shards, checkpoints and Hugging Face model folders (tools/malformed.py),
and puts hostile pickles into checkpoints (tools/malformed_pickles.py).  run_pretraining.main() is called with them in
this process; shards are read in its child process, as in any run.  A run may end with a UserError whose line names the
file or a flag, or with exit code 2.  It may train if the change left the input valid.  Anything else is a failure: a
traceback, a hang, a crash, a missing checkpoint, an executed payload, a request for gigabytes of memory.

    python tools/fuzz.py --inputs 10000
    python tools/fuzz.py --inputs 10000 --kinds pickle
"""

import argparse
import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import traceback
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from io import StringIO
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import seed as hypothesis_seed  # noqa: E402
from tqdm import tqdm  # noqa: E402

import run_pretraining  # noqa: E402
from common import cli  # noqa: E402
from common.errors import UserError  # noqa: E402
from data.shard_reader import ShardReader  # noqa: E402
from tools import malformed, malformed_pickles  # noqa: E402
from tools.malformed import Kind  # noqa: E402

ROUND = 100  # inputs that Hypothesis draws at a time
SMALLEST_ROUND = 10  # the first input that it draws is always the simplest, which may be a valid one
LONGEST_ROUND = 600.0  # seconds; a longer round is a hang
LONGEST_READ = 20.0  # seconds of processor time for the six rows of a shard
MORE_MEMORY = 2 << 30  # bytes that an input may take beside what the process has
CHILD_OUTPUT = "child_output.txt"
LONGEST_LINE = 1000  # characters of an error line


@dataclass
class Counts:
    """Counts of the inputs of one kind, by outcome."""

    inputs: int = 0
    refused: int = 0
    trained: int = 0
    failures: list[str] = field(default_factory=list)


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=cli.positive_int, default=10_000,
                        help="stop after this many inputs were refused, over all kinds")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the inputs")
    parser.add_argument("--kinds", default="", help="only the kinds of inputs whose names hold this word")
    parser.add_argument("--failed_dir", help="folder to which failed inputs are written")
    parser.add_argument("--json", action="store_true", help="print the counts as JSON")
    args = parser.parse_args(argv)
    before = os.getcwd()
    failed_dir = args.failed_dir and Path(args.failed_dir).resolve()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            tallies = fuzz(Path(folder), args.inputs, args.seed, failed_dir, args.kinds)
        finally:
            os.chdir(before)
    print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}) if args.json else in_words(tallies))
    if any(tally.failures for tally in tallies.values()):
        raise UserError("some inputs were not refused as they should be: see above")


def in_words(tallies: dict[str, Counts]) -> str:
    lines = [f"{name}: {tally.inputs} inputs, {tally.refused} refused in one line, {tally.trained} still valid and "
             f"trained, {len(tally.failures)} failures" for name, tally in tallies.items()]
    total = [sum(getattr(tally, name) for tally in tallies.values()) for name in ("inputs", "refused", "trained")]
    failures = {f"{name}: {failure}": 1 for name, tally in tallies.items() for failure in tally.failures}
    return "\n".join([*lines, "together: {} inputs, {} refused, {} trained".format(*total)
                      + f", {len(failures)} different failures", *failures])


@contextmanager
def stderr_to_file():
    """A block in which the stderr of child processes and libraries goes to CHILD_OUTPUT; it yields the screen."""
    with os.fdopen(os.dup(2), "w", encoding="utf-8") as screen, open(CHILD_OUTPUT, "ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield screen
        finally:
            os.dup2(screen.fileno(), 2)


@contextmanager
def no_longer_than(seconds: float, screen):
    """A block that ends the process with a traceback of all threads if it takes longer."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=screen)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def limited_memory():
    """A block in which this process cannot get MORE_MEMORY beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MORE_MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(folder: Path, inputs: int, seed: int, failed_dir: Path | None = None, word: str = "") -> dict[str, Counts]:
    """Try inputs of all kinds with `word` in their names in turn, until `inputs` were refused.

    The working folder must be `folder`.
    """
    kinds = [kind for kind in malformed.kinds(folder) if word in kind.name]
    if not kinds:
        raise UserError(f"--kinds {word}: no kind of input has this in its name")
    found = {kind.name: Counts() for kind in kinds}
    rng = random.Random(seed)
    with (stderr_to_file() as screen, ShardReader(LONGEST_READ) as reader,
          tqdm(total=inputs, unit="input", disable=None, file=screen) as bar):
        for kind in kinds:
            Path(kind.file).write_bytes(kind.sound)
            with redirect_stdout(StringIO()):
                train_one_step(kind.flags, reader)  # a valid input must train, else a refusal proves nothing
        while (missing := inputs - sum(tally.refused for tally in found.values())) > 0:
            for kind in kinds:
                count = min(ROUND, max(SMALLEST_ROUND, -(-missing // len(kinds))))
                with no_longer_than(LONGEST_ROUND, screen), limited_memory():
                    run_round(kind, found[kind.name], count, rng.randrange(2**32), reader, failed_dir)
                bar.n = sum(tally.refused for tally in found.values())
                bar.refresh()
    return found


def run_round(kind: Kind, tally: Counts, count: int, seed: int, reader: ShardReader, failed_dir: Path | None) -> None:
    """Draw and try `count` inputs in this process, so that neither torch nor the reader starts again."""
    @hypothesis_seed(seed)
    @settings(max_examples=count, phases=[Phase.generate], database=None, deadline=None,
              suppress_health_check=list(HealthCheck))
    @given(kind.contents)
    def try_each(contents: bytes) -> None:
        Path(kind.file).write_bytes(contents)
        failure = try_input(kind, tally, reader)
        if failure:
            tally.failures.append(failure)
            keep(contents, f"{kind.name} {tally.inputs}", failed_dir)

    try_each()
    Path(kind.file).write_bytes(kind.sound)


def try_input(kind: Kind, tally: Counts, reader: ShardReader) -> str | None:
    """Train with the input that kind.file holds; a description of the failure, None where there is none."""
    tally.inputs += 1
    files = listing()
    screen = StringIO()
    try:
        with redirect_stdout(screen), redirect_stderr(screen):
            train_one_step(kind.flags, reader)
    except UserError as error:
        line = " ".join(str(error).split())
    except SystemExit as end:
        line = screen.getvalue().strip()
        if end.code != 2 or len(line.splitlines()) != 1:
            return f"ended with {end.code}: {line}"
    except Exception:  # of any type: the user would see a traceback
        return traceback.format_exc()
    else:
        tally.trained += 1
        return executed()
    tally.refused += 1
    return executed() or wrong_with(line, kind) or wrong_with_child() or wrong_with_files(files, listing())


def train_one_step(flags: dict, reader: ShardReader) -> None:
    """One step of a tiny model, its shards read by a child process that outlives this training."""
    values = {"do_train": True, "config_file": "config.json", "input_dir": "data", "output_dir": "new",
              "max_seq_length": malformed.LENGTH, "max_predictions_per_seq": 2 * malformed.PREDICTIONS,
              "train_batch_size": 4, "max_steps": 2, "skip_checkpoint": True, "json_summary": "log.json",
              "no_cuda": True, "use_cpu_kernels": "no", "peak_tflops": 1.0, **flags}
    with patch.object(run_pretraining, "ShardReader", lambda: nullcontext(reader)):
        run_pretraining.main([f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()])


def executed() -> str | None:
    """What is wrong where an input was executed."""
    marker = Path(malformed_pickles.MARKER)
    if not marker.exists():
        return None
    marker.rmdir() if marker.is_dir() else marker.unlink()
    return "something in the file was executed"


def wrong_with(line: str, kind: Kind) -> str | None:
    """What is wrong with the error line of a refused run."""
    if not 10 < len(line) <= LONGEST_LINE:
        return f"a line of {len(line)} characters: {line[:300]}"
    if not any(part in line for part in (*Path(kind.file).parts, "--")):
        return f"neither file nor flag is named: {line}"
    if Path(kind.file).suffix in (".pt", ".bin") and (not line.isprintable() or "fit into memory" in line):
        return f"the line holds what controls a terminal, or speaks of too little memory: {line!r}"
    return None


def wrong_with_child() -> str | None:
    text = Path(CHILD_OUTPUT).read_text(encoding="utf-8", errors="replace")
    os.truncate(CHILD_OUTPUT, 0)
    return f"the child process printed {text}" if "Traceback" in text else None


def listing() -> dict[str, int]:
    """The sizes of all files, except those that a run may write."""
    return {str(path): path.stat().st_size for path in Path().rglob("*")
            if path.is_file() and path.name not in ("log.json", CHILD_OUTPUT)}


def wrong_with_files(before: dict, after: dict) -> str | None:
    changed = sorted(name for name in {**before, **after} if before.get(name) != after.get(name))
    return f"a run that was refused changed {', '.join(changed)}" if changed else None


def keep(contents: bytes, name: str, failed_dir: Path | None) -> None:
    if failed_dir:
        failed_dir.mkdir(parents=True, exist_ok=True)
        (failed_dir / name.replace(" ", "_")).write_bytes(contents)


if __name__ == "__main__":
    cli.run(main)
