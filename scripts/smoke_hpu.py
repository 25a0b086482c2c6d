"""The checks of smoke_hpu.sh: they compare short training runs on the CPU and on HPU by their logs.

One line a check: PASS, FAIL, or NOTE where there is nothing to decide.
"""

import sys
from pathlib import Path
from tempfile import mkdtemp

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import cli
from scripts.smoke import all_cards, one_card
from scripts.smoke.runs import Report, Runs

LAUNCHERS = ("torchrun", "mpirun")
GROUPS = ("modes", "checkpoints", "cache", "times", "shapes", "cards")


def main(argv=None) -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", metavar="GROUP", default=GROUPS,
                        help=f"checks to make: {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--launcher", choices=LAUNCHERS, help="for the checks on all cards (default: both)")
    parser.add_argument("--config_file", type=Path, default=Path("bert_config.json"),
                        help="config of the model to time")
    parser.add_argument("--large_config_file", type=Path, default=Path("bert_config_1.2B.json"),
                        help="config of the model whose optimizer state is sharded")
    parser.add_argument("--train_batch_size", type=cli.positive_int, default=128,
                        help="sequences per step of the timed model, in 2 micro-batches")
    parser.add_argument("--folder", type=Path, help="folder for data and logs (default: a temporary folder, kept)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.groups) - set(GROUPS))
    if unknown:
        parser.error(f"{unknown[0]} is not one of {', '.join(GROUPS)}")
    return check(args, Runs(args.folder or Path(mkdtemp(prefix="smoke_hpu_"))), Report())


def check(args, runs: Runs, report: Report) -> int:
    """Make the checks of the chosen groups; the exit code."""
    launchers = [args.launcher] if args.launcher else LAUNCHERS
    config, large_config = args.config_file.resolve(), args.large_config_file.resolve()
    print(f"data, logs and output of all runs: {runs.folder}", flush=True)
    cards = one_card.check_software(runs, report)
    if cards:
        runs.write_inputs()
        checks = {
            "modes": lambda: one_card.check_modes(runs, report),
            "checkpoints": lambda: one_card.check_checkpoints(runs, report),
            "cache": lambda: one_card.check_recipe_cache(runs, report),
            "times": lambda: one_card.time_modes(runs, report, config, args.train_batch_size),
            "shapes": lambda: (one_card.check_shapes(runs, report, config),
                               all_cards.check_large_model(runs, report, large_config, cards)),
            "cards": lambda: all_cards.check_all_cards(runs, report, cards, launchers),
        }
        for group in args.groups:
            checks[group]()
    print(f"{report.failed} failed" if report.failed else "all passed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    cli.run(main)
