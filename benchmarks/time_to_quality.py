"""Seconds of training until a small BERT has learned something: this repository against transformers with AdamW.

    python benchmarks/time_to_quality.py [--json] [--data DIR] [--plot FILE.png] [--seeds N]

Quality is the held-out MLM loss on rows of 16 tokens (15 % masks), in nats below the line: the loss that a model
without context reaches.  Both train on the quickstart's samples of 16 tokens, 40 % of them masked, in the model of
scripts/quickstart_config.json, from the same weights, in fp32 on the CPU:

- this repository: the training command as quickstart.sh runs phase 1, on packed rows and with the CPU kernels, but with
  AdamW, which is faster here than LAMB;
- transformers: BertForPreTraining with AdamW (linear warm-up over a tenth of the steps, linear decay, weight decay
  0.01, betas 0.9 and 0.999, clipping at 1.0), in the faster of its attention implementations.  It cannot pack, so it
  gets the same sequences unpacked.  First it is run with three rates, then the best of them with two other batches; the
  best run's rate and batch are used against ours.

The second part trains on rows of 512 tokens, packed and unpacked, with the same sequences in a step.

Trainings take turns of some steps, so that a slow moment of the machine meets all.  Evaluations do not count as time.
"""

import json
import statistics
from pathlib import Path

from measuring import machine, report, spread  # puts the repository's root on the path

# isort: split
import quickstart_data
from common import cli
from quickstart_data import SampleFolders, SampleSet
from race import Contestant, race, seconds_at

MARKS = (0.0, 0.15, 0.3, 1.0)  # nats below the line
CHOSEN_BY = 0.3  # the mark that decides between transformers' rates and batches
GOAL = 0.5  # of the time ratio
STEPS = 3200  # of the schedules, at ROWS sequences a step
OUR_RECIPE = {"optimizer": "adamw", "learning_rate": 0.002, "warmup_proportion": 0.1}  # the best of 16, LAMB's too
RATES, ROWS, OTHER_ROWS = (5e-4, 1e-3, 2e-3), 64, (32, 128)
SHORT = SampleSet(length=16, masked_share=0.4, vocab_size=2048)
LONG = SampleSet(length=512, masked_share=0.15, vocab_size=2048, predictions=80)
LONG_ROWS = 16  # unpacked, in a step
PARTS = ("transformers", "packing")


def main(argv=None) -> None:
    args = parse_arguments(argv)
    output = Path(args.data).absolute()
    figures = {"machine": machine(*(["transformers"] if "transformers" in args.parts else []))}
    with cli.sigterm_as_interrupt():
        if "transformers" in args.parts:
            figures["transformers"] = against_transformers(args, output)
        if "packing" in args.parts:
            figures["packing"] = packed_against_unpacked(args, output)
    if args.plot:
        from quality_plot import plot_curves

        plot_curves(figures, args.plot)
    report(figures, args.json, lines(figures))


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to compare with")
    parser.add_argument("--seeds", type=cli.positive_int, default=3, help="pairs of trainings, with seeds 1, 2, …")
    parser.add_argument("--steps", type=cli.positive_int, default=STEPS,
                        help=f"steps of the schedules, at {ROWS} sequences a step")
    parser.add_argument("--every", type=cli.positive_int, default=100, help=f"steps between evaluations, at {ROWS} "
                        "sequences a step; with other batches they come after as many sequences")
    parser.add_argument("--limit", type=cli.positive_int, default=120, metavar="SECONDS",
                        help="end a training after this many seconds")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="transformers' rates to choose from")
    parser.add_argument("--rows", type=cli.positive_int, nargs="*", default=OTHER_ROWS,
                        help=f"transformers' batches to choose from, beside {ROWS} rows")
    parser.add_argument("--packing_steps", type=cli.positive_int, default=240, help="steps on rows of 512 tokens")
    parser.add_argument("--init_checkpoint", metavar="FILE", help="weights to start from on rows of 512 tokens, such "
                        "as the quickstart's last checkpoint (default: fresh ones, which stay near the line)")
    parser.add_argument("--data", default=quickstart_data.default_output(), metavar="DIR",
                        help="output folder of quickstart.sh, or a folder to make its text in")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the losses over the seconds")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


# --- against transformers ---

def against_transformers(args, output: Path) -> dict:
    folders = quickstart_data.prepared_samples(output, SHORT)
    work = output / "benchmarks" / "time_to_quality"
    quickstart_data.write_model_config(work / "config.json", folders.vocabulary)
    choice, rate, rows = chosen_recipe(args, folders, work)
    pairs = []
    for seed in range(1, args.seeds + 1):
        pair = [our_training(args, folders, work, seed), rival_training(args, folders, work, rate, rows, seed)]
        pairs.append([result_of(contestant) for contestant in
                      race(pair, lambda contestant: below(contestant) >= MARKS[-1], args.limit, f"seed {seed}")])
    return {"choice": choice, "rate": rate, "rows": rows, "marks": [compare_at(mark, pairs) for mark in MARKS],
            "pairs": [{"ours": ours, "transformers": theirs} for ours, theirs in pairs]}


def chosen_recipe(args, folders: SampleFolders, work: Path) -> tuple[list[dict], float, int]:
    """All that was tried; the rate and the rows of the fastest, of those that reach no mark the lowest loss."""
    def tried(recipes: list[tuple[float, int]], what: str) -> list[tuple]:
        contestants = [rival_training(args, folders, work, rate, rows, seed=1) for rate, rows in recipes]
        race(contestants, lambda contestant: below(contestant) >= CHOSEN_BY, args.limit, what)
        return [(rate, rows, result_of(contestant))
                for (rate, rows), contestant in zip(recipes, contestants, strict=True)]

    found = tried([(rate, ROWS) for rate in args.rates], "transformers' rates")
    best = min(found, key=speed)
    found += tried([(best[0], rows) for rows in args.rows], "transformers' batches") if args.rows else []
    rate, rows, _ = min(found, key=speed)
    return [{"rate": rate, "rows": rows, **result} for rate, rows, result in found], rate, rows


def speed(tried: tuple[float, int, dict]) -> tuple[float, float]:
    """Less is better: the seconds to the mark, else the last loss."""
    result = tried[2]
    seconds = result["seconds_to"][str(CHOSEN_BY)]
    return (float("inf") if seconds is None else seconds, -result["last_below"])


def our_training(args, folders: SampleFolders, work: Path, seed: int) -> Contestant:
    return Contestant("this repository", "ours", training_flags(
        folders, work, SHORT, rows=ROWS, steps=args.steps, every=args.every, seed=seed))


def training_flags(folders: SampleFolders, work: Path, samples: SampleSet, *, rows: int, steps: int, every: int,
                   seed: int, packed: bool = True) -> list[str]:
    """The flags of the training command."""
    own = work / ("packed" if packed else "unpacked")  # two trainings do not share a folder
    values = {"config_file": work / "config.json", "input_dir": folders.packed if packed else folders.unpacked,
              "eval_dir": folders.held_out, "output_dir": own, "json_summary": own / "log.json",
              "max_seq_length": samples.length, "max_predictions_per_seq": samples.training.max_predictions_per_seq,
              "train_batch_size": rows, "max_steps": steps, "eval_freq": every, "log_freq": every, "seed": seed,
              "peak_tflops": 1.0, **OUR_RECIPE}
    return ["--do_train", "--no_cuda", "--skip_checkpoint", "--disable_progress_bar",
            *(f"--{name}={value}" for name, value in values.items())]


def rival_training(args, folders: SampleFolders, work: Path, rate: float, rows: int, seed: int) -> Contestant:
    steps, every = (max(1, count * ROWS // rows) for count in (args.steps, args.every))
    return Contestant(f"transformers, {rate:g}, {rows} rows", "transformers", {
        "config_file": str(work / "config.json"), "input_dir": str(folders.unpacked), "rows": rows, "steps": steps,
        "counts_dir": str(folders.packed), "eval_dir": str(folders.held_out), "learning_rate": rate, "every": every,
        "seed": seed})


def below(contestant: Contestant) -> float:
    """Nats below the line after the last segment."""
    last = contestant.points[-1]
    return last["context_free_mlm_loss"] - last["mlm_loss"]


def result_of(contestant: Contestant) -> dict:
    """The figures of a finished training."""
    points, line = contestant.points, contestant.points[-1]["context_free_mlm_loss"]
    return {"line": line, "seconds": points[-1]["seconds"], "steps": points[-1]["step"],
            "last_below": below(contestant),
            "seconds_to": {str(mark): seconds_at(points, line - mark) for mark in MARKS}, "curve": curve_of(points)}


def curve_of(points: list[dict]) -> list[dict]:
    return [{key: point[key] for key in ("seconds", "step", "trained_sequences", "mlm_loss")} for point in points]


def compare_at(mark: float, pairs: list[list[dict]]) -> dict:
    """Both sides' seconds to a mark over the seeds, and the ratio of the medians; at_most where transformers missed it.

    A training that misses the mark has None; a side has no median unless all of its trainings reach the mark.
    """
    ours, theirs = ([result["seconds_to"][str(mark)] for result in side] for side in zip(*pairs, strict=True))
    limits = [theirs_run["seconds"] if seconds is None else seconds
              for (_, theirs_run), seconds in zip(pairs, theirs, strict=True)]
    ratio = None if None in ours else statistics.median(ours) / statistics.median(limits)
    return {"below": mark, "ours": ours, "transformers": theirs,
            "ours_spread": None if None in ours else spread(ours),
            "transformers_spread": None if None in theirs else spread(theirs),
            "time_ratio": None if None in theirs else ratio, "time_ratio_at_most": ratio}


# --- packed against unpacked rows ---

def packed_against_unpacked(args, output: Path) -> dict:
    folders = quickstart_data.prepared_samples(output, LONG)
    work = output / "benchmarks" / "time_to_quality"
    quickstart_data.write_model_config(work / "config.json", folders.vocabulary)
    metadata = json.loads(folders.packed.with_name(f"{folders.packed.name}_metadata.json").read_text(encoding="utf-8"))
    sequences_per_row = metadata["avg_seq_per_sample"]
    every, start = max(1, args.packing_steps // 16), []
    if args.init_checkpoint:
        start = [f"--init_checkpoint={Path(args.init_checkpoint).absolute()}"]
    contestants = [Contestant(name, "ours", start + training_flags(
        folders, work, LONG, rows=rows, steps=args.packing_steps, every=every, seed=1, packed=name == "packed"))
        for name, rows in (("packed", max(1, round(LONG_ROWS / sequences_per_row))), ("unpacked", LONG_ROWS))]
    packed, unpacked = race(contestants, lambda contestant: False, 10 * args.limit, "512 tokens")
    common_loss = max(min(point["mlm_loss"] for point in contestant.points) for contestant in (packed, unpacked))
    figures = {contestant.name: packing_result(contestant, common_loss) for contestant in (packed, unpacked)}
    return {"sequences_per_row": sequences_per_row, "line": packed.points[-1]["context_free_mlm_loss"],
            "common_loss": common_loss, **figures,
            "speed_ratio": figures["packed"]["sequences_per_second"] / figures["unpacked"]["sequences_per_second"],
            "time_ratio": figures["packed"]["seconds_to_common_loss"] / figures["unpacked"]["seconds_to_common_loss"]}


def packing_result(contestant: Contestant, common_loss: float) -> dict:
    last = contestant.points[-1]
    sequences, seconds = last["trained_sequences"], last["seconds"]
    return {"steps": last["step"], "sequences_per_step": sequences / last["step"], "seconds": seconds,
            "sequences_per_second": sequences / seconds, "mlm_loss": last["mlm_loss"],
            "seconds_to_common_loss": seconds_at(contestant.points, common_loss), "curve": curve_of(contestant.points)}


# --- what is printed ---

def lines(figures: dict) -> list[str]:
    return [*(quality_lines(figures["transformers"]) if "transformers" in figures else []),
            *(packing_lines(figures["packing"]) if "packing" in figures else [])]


def quality_lines(found: dict) -> list[str]:
    return [f"seconds of training until the held-out MLM loss is so far below the line; transformers with its best of "
            f"{len(found['choice'])} recipes: rate {found['rate']:g}, {found['rows']} rows",
            f"  {'nats below':12s}{'this repository':26s}{'transformers':26s}ratio (goal: at most {GOAL})",
            *(f"  {mark['below']:<12g}{in_seconds(mark['ours_spread']):26s}"
              f"{in_seconds(mark['transformers_spread']):26s}{as_ratio(mark)}" for mark in found["marks"])]


def in_seconds(found: dict | None) -> str:
    return f"{found['median']:.1f} s ({found['min']:.1f} to {found['max']:.1f})" if found else "not in all runs"


def as_ratio(mark: dict) -> str:
    if mark["time_ratio"] is None:
        return "–" if mark["time_ratio_at_most"] is None else f"below {mark['time_ratio_at_most']:.2f}"
    return f"{mark['time_ratio']:.2f}"


def packing_lines(found: dict) -> list[str]:
    return [f"rows of 512 tokens, {found['sequences_per_row']:.3f} sequences in a packed one (the line: "
            f"{found['line']:.3f})",
            *(f"  {name:10s}{run['sequences_per_step']:5.1f} sequences a step, {run['sequences_per_second']:6.1f} "
              f"sequences/s, MLM loss {run['mlm_loss']:.3f} after {run['steps']} steps and {run['seconds']:.1f} s, "
              f"{found['common_loss']:.3f} after {run['seconds_to_common_loss']:.1f} s"
              for name, run in ((name, found[name]) for name in ("packed", "unpacked"))),
            f"  packed rows: {found['speed_ratio']:.2f} times the sequences/s, the same loss in "
            f"{found['time_ratio']:.2f} of the time"]


if __name__ == "__main__":
    cli.run(main)
