"""What leads a small BERT off the plateau: the quickstart's phase 1, with one thing changed at a time.

    python benchmarks/quickstart_sweep.py [--json] [--budget TOKENS] [--only NAME…] [--seeds N] [--data DIR]

Every run is the training command in a child process, on the quickstart's text.  After it stand the held-out MLM loss
(15 % masks, rows of the run's own length), the loss that a model without context reaches there (the line), and how far
below the line the run ends.  A model on the plateau ends at the line.

All runs see the same number of tokens.  Runs with other row lengths keep the tokens of a step, so they also take the
same number of steps.  A finished run is kept in the data folder and is not repeated by a second start; delete
benchmarks/sweep/results.json there to repeat all.
"""

import json
import re
import shutil
import statistics
import subprocess
import sys
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tqdm import tqdm

from measuring import ROOT, machine, report, spread  # puts the repository's root on the path

# isort: split
import quickstart_data
from common import cli
from common.errors import UserError
from common.files import write_json
from quickstart_data import SampleSet

PHASE1_STEPS, PHASE2_STEPS = 3200, 1800  # of quickstart.sh
TOKENS_PER_STEP = 1024
EVALUATIONS = 16  # of a run
OFF_THE_PLATEAU = 0.3  # nats below the line
STEP_LINE = re.compile(r"epoch \d+ step (\d+) ")  # of a run's console lines


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a run is made with; the defaults are the quickstart's phase 1, with scripts/quickstart_config.json."""

    row_length: int = 16
    masked_share: float = 0.4
    vocabulary: int = 2048
    rows: int = 64  # in a step
    learning_rate: float = 0.01
    optimizer: str = "lamb"
    warmup: float = 0.2  # share of the steps
    config: dict = field(default_factory=dict)  # changes of the model config
    changes: dict = field(default_factory=dict)  # of the training command, see changed_training.py
    phase2: bool = False  # continues the quickstart's phase 1

    def steps(self, budget: int) -> int:
        tokens = budget * PHASE2_STEPS // PHASE1_STEPS if self.phase2 else budget
        return max(2, tokens // (self.rows * self.row_length))


QUICKSTART = Settings()
SAME = {}  # a value of a factor that is the quickstart's own
FACTORS: dict[str, dict[str, dict]] = {  # factor → value → what it changes in QUICKSTART
    "row_length": {"12": {"row_length": 12, "rows": 85}, "16": SAME, "24": {"row_length": 24, "rows": 43},
                   "32": {"row_length": 32, "rows": 32}, "64": {"row_length": 64, "rows": 16}},
    "masked_share": {"0.15": {"masked_share": 0.15}, "0.25": {"masked_share": 0.25}, "0.4": SAME},
    "learning_rate": {"0.005": {"learning_rate": 0.005}, "0.01": SAME, "0.02": {"learning_rate": 0.02}},
    "rows_per_step": {"32": {"rows": 32}, "64": SAME, "128": {"rows": 128}},
    "initializer_range": {"0.02": {"config": {"initializer_range": 0.02}}, "0.04": SAME,
                          "0.08": {"config": {"initializer_range": 0.08}}},
    "layers": {"1": {"config": {"num_hidden_layers": 1}}, "2": SAME, "4": {"config": {"num_hidden_layers": 4}}},
    "hidden_size": {"64": {"config": {"hidden_size": 64, "intermediate_size": 256}}, "128": SAME,
                    "256": {"config": {"hidden_size": 256, "intermediate_size": 1024}}},
    "heads": {"2": {"config": {"num_attention_heads": 2}}, "4": SAME},
    "vocabulary": {"2048": SAME, "8192": {"vocabulary": 8192}},
    "warmup": {"0.05": {"warmup": 0.05}, "0.2": SAME},
    "nsp_weight": {"0": {"changes": {"nsp_weight": 0.0}}, "1": SAME},
    "beta2": {"0.98": {"changes": {"beta2": 0.98}}, "0.999": SAME},
    "optimizer": {"LAMB": SAME, **{f"AdamW {rate}": {"learning_rate": rate, "optimizer": "adamw"}
                                   for rate in (0.001, 0.002)}},
    # At 128 tokens 8 rows are too few: the batch keeps its 16 rows, and the run takes half as many steps.
    "phase2_length": {"64": {"phase2": True, "row_length": 64, "rows": 16, "learning_rate": 0.007},
                      "128": {"phase2": True, "row_length": 128, "rows": 16}},
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a setting with a seed."""

    factor: str  # "quickstart" where nothing is changed
    value: str
    settings: Settings
    seed: int
    budget: int  # tokens of phase 1

    @property
    def name(self) -> str:
        return f"{self.factor} {self.value}".strip() + f", seed {self.seed}"

    @property
    def steps(self) -> int:
        return self.settings.steps(self.budget)

    @property
    def tokens(self) -> int:
        return self.steps * self.settings.rows * self.settings.row_length

    @property
    def key(self) -> str:
        """What a finished run is known by: all that it depends on."""
        return json.dumps({**asdict(self.settings), "seed": self.seed, "budget": self.budget}, sort_keys=True)

    def folder(self, output: Path) -> Path:
        what = re.sub(r"\W+", "_", f"{self.factor} {self.value}".strip())
        return output / "benchmarks" / "sweep" / f"{what}_{self.budget}_{self.seed}"

    def base(self) -> "Run":
        """The quickstart's phase 1 with the same seed and budget."""
        return replace(self, factor="quickstart", value="", settings=QUICKSTART)


def main(argv=None) -> None:
    args = parse_arguments(argv)
    output = Path(args.data).absolute()
    with cli.sigterm_as_interrupt():
        results, failures = finish_runs(planned_runs(args), output)
    figures = {"budget_tokens": args.budget, "seeds": args.seeds, "factors": summary(args.only, results),
               "failures": failures, "machine": machine()}
    report(figures, args.json, table_lines(figures))


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=cli.positive_int, default=PHASE1_STEPS * TOKENS_PER_STEP, metavar="TOKENS",
                        help="tokens of a run of phase 1; one of phase 2 takes 9/16 of them")
    parser.add_argument("--only", nargs="+", choices=FACTORS, default=list(FACTORS), metavar="NAME",
                        help=f"the factors to change: {', '.join(FACTORS)}")
    parser.add_argument("--seeds", type=cli.positive_int, default=1, help="runs of each setting, with seeds 1, 2, …")
    parser.add_argument("--data", default=quickstart_data.default_output(), metavar="DIR",
                        help="output folder of quickstart.sh, or a folder to make its text in")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


# --- the runs ---

def planned_runs(args) -> list[Run]:
    """A whole sweep with the first seed, then one with the next; each begins with the quickstart's own run."""
    return [Run(factor=factor, value=value, settings=replace(QUICKSTART, **changes), seed=seed, budget=args.budget)
            for seed in range(1, args.seeds + 1)
            for factor, values in {"quickstart": {"": SAME}, **{name: FACTORS[name] for name in args.only}}.items()
            for value, changes in values.items() if changes or factor == "quickstart"]


def finish_runs(runs: list[Run], output: Path) -> tuple[list[tuple[Run, dict]], dict[str, str]]:
    """Train what has not been trained before; the runs with their figures, and why others failed."""
    path = output / "benchmarks" / "sweep" / "results.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    pending, failures = [run for run in runs if run.key not in known], {}
    with tqdm(total=sum(run.tokens for run in pending), unit="token", unit_scale=True, smoothing=0.05) as bar:
        for number, run in enumerate(pending, 1):
            bar.set_description(f"run {number} of {len(pending)}: {run.name}")
            start = bar.n
            try:
                known[run.key] = trained(run, output, bar)
            except UserError as error:
                failures[run.name] = str(error)
                tqdm.write(f"{run.name}: failed: {error}", file=sys.stderr)
            else:
                write_json(path, known)
                tqdm.write(progress_line(run, known[run.key]), file=sys.stderr)
            bar.update(start + run.tokens - bar.n)
    return [(run, known[run.key]) for run in runs if run.key in known], failures


def trained(run: Run, output: Path, bar) -> dict:
    """Train in a child process; the figures of its log.  UserError where it fails."""
    if run.settings.phase2 and not base_checkpoint(run, output).exists():
        train_in_child(run.base(), output)
    train_in_child(run, output, bar)
    return figures_of_log(run.folder(output) / "log.json", run)


def base_checkpoint(run: Run, output: Path) -> Path:
    return run.base().folder(output) / f"ckpt_{run.base().steps}.pt"


def train_in_child(run: Run, output: Path, bar=None) -> None:
    shutil.rmtree(run.folder(output), ignore_errors=True)
    command = [sys.executable, ROOT / "benchmarks" / "changed_training.py", json.dumps(run.settings.changes),
               *training_flags(run, output)]
    last_lines, last_step = deque(maxlen=3), 0
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", errors="replace") as child:
        try:
            for line in child.stdout:
                last_lines.append(line.strip())
                if bar is not None and (match := STEP_LINE.match(line)):
                    bar.update((int(match[1]) - last_step) * run.tokens // run.steps)
                    last_step = int(match[1])
        except BaseException:
            child.kill()
            raise
    if child.returncode:
        raise UserError(f"exit code {child.returncode}: {' / '.join(last_lines)}")


def training_flags(run: Run, output: Path) -> list[str]:
    """The flags of the training command; the samples and the model config are made."""
    settings, folder = run.settings, run.folder(output)
    samples = SampleSet(settings.row_length, settings.masked_share, settings.vocabulary)
    folders = quickstart_data.prepared_samples(output, samples)
    quickstart_data.write_model_config(folder / "config.json", folders.vocabulary, **settings.config)
    every = max(1, run.steps // EVALUATIONS)
    values = {"input_dir": folders.packed, "eval_dir": folders.held_out, "config_file": folder / "config.json",
              "output_dir": run.base().folder(output) if settings.phase2 else folder, "seed": run.seed,
              "json_summary": folder / "log.json", "max_seq_length": settings.row_length,
              "max_predictions_per_seq": samples.training.max_predictions_per_seq,
              "train_batch_size": settings.rows, "max_steps": run.steps, "learning_rate": settings.learning_rate,
              "optimizer": settings.optimizer, "warmup_proportion": settings.warmup, "eval_freq": every,
              "log_freq": every, "peak_tflops": 1.0}
    flags = ["--do_train", "--no_cuda", "--disable_progress_bar"]
    if settings.optimizer == "lamb":
        flags.append("--use_fused_lamb")
    if settings.phase2:
        flags += ["--phase2", "--resume_from_checkpoint", f"--phase1_end_step={run.base().steps}"]
    if settings != QUICKSTART:  # whose checkpoint the runs of phase 2 continue from
        flags.append("--skip_checkpoint")
    return [*flags, f"--num_steps_per_checkpoint={run.steps}", *(f"--{name}={value}" for name, value in values.items())]


def figures_of_log(path: Path, run: Run) -> dict:
    """The figures of a finished run.  Its seconds are those of the training alone, without the evaluations."""
    from training.log import read_log

    curve, seconds, last_step = [], 0.0, 0
    for line in read_log(str(path)):
        step, data = line["step"][1] if isinstance(line["step"], list) and line["step"] else 0, line["data"]
        if "step_time" in data:
            seconds += data["step_time"] * (step - last_step)
            last_step = step
        if "eval_mlm_loss" in data:
            curve.append({"step": step, "tokens": step * run.settings.rows * run.settings.row_length,
                          "seconds": seconds, **data})
    if not curve or curve[-1]["step"] != run.steps:
        raise UserError(f"{path}: the run did not reach step {run.steps}")
    last, off = curve[-1], [point["tokens"] for point in curve if below(point) >= OFF_THE_PLATEAU]
    return {"steps": run.steps, "seconds": seconds, "mlm_loss": last["eval_mlm_loss"],
            "line": last["eval_context_free_mlm_loss"], "below": below(last), "mlm_accuracy": last["eval_mlm_accuracy"],
            "nsp_accuracy": last["eval_nsp_accuracy"], "nsp_larger_class": last["eval_nsp_larger_class"],
            "tokens_until_off": off[0] if off else None,
            "curve": [{"tokens": point["tokens"], "seconds": point["seconds"], "below": below(point)}
                      for point in curve]}


def below(point: dict) -> float:
    return point["eval_context_free_mlm_loss"] - point["eval_mlm_loss"]


# --- what is printed ---

def progress_line(run: Run, figures: dict) -> str:
    return (f"{run.name}: {figures['steps']} steps, {figures['seconds']:.0f} s, MLM loss {figures['mlm_loss']:.3f}, "
            f"{figures['below']:+.3f} below the line")


def summary(factors: list[str], results: list[tuple[Run, dict]]) -> list[dict]:
    """The medians over the seeds of each value of each factor, in the order of FACTORS."""
    found = []
    for factor in (name for name in FACTORS if name in factors):
        for value, changes in FACTORS[factor].items():
            settings = replace(QUICKSTART, **changes)
            runs = [figures for run, figures in results if run.settings == settings]
            if runs:
                found.append({"factor": factor, "value": value, "is_quickstart": settings == QUICKSTART,
                              "below": spread([figures["below"] for figures in runs]), **medians(runs), "runs": runs})
    return found


def medians(runs: list[dict]) -> dict:
    names = ("steps", "seconds", "mlm_loss", "line", "mlm_accuracy", "nsp_accuracy", "nsp_larger_class")
    off = [figures["tokens_until_off"] for figures in runs]
    return {**{name: statistics.median(figures[name] for figures in runs) for name in names},
            "tokens_until_off": None if None in off else statistics.median(off)}


def table_lines(figures: dict) -> list[str]:
    lines = [f"{figures['budget_tokens']} tokens a run, {figures['seeds']} seed(s): held-out MLM loss, and nats below "
             f"the line that is reached without context",
             f"{'factor':18s}{'value':>12s}{'steps':>7s}{'seconds':>9s}{'loss':>8s}{'line':>8s}  "
             f"{'below (least to most)':24s}{'accuracy':>9s}  tokens until {OFF_THE_PLATEAU} below"]
    for row in figures["factors"]:
        found, off = row["below"], row["tokens_until_off"]
        lines.append(
            f"{row['factor']:18s}{row['value'] + ' *' * row['is_quickstart']:>12s}{row['steps']:7.0f}"
            f"{row['seconds']:9.0f}{row['mlm_loss']:8.3f}{row['line']:8.3f}  "
            f"{found['median']:+.3f} ({found['min']:+.3f} to {found['max']:+.3f})  {row['mlm_accuracy']:9.1%}  "
            f"{'not reached' if off is None else f'{off / 1e6:.2f} million'}")
    return [*lines, *(f"failed: {name}: {why}" for name, why in figures["failures"].items()), "* the quickstart's own"]


if __name__ == "__main__":
    cli.run(main)
