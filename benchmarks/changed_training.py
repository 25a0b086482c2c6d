"""run_pretraining.py with changes that it has no flag for.  The benchmarks run it in a child process.

    python benchmarks/changed_training.py '{"nsp_weight": 0.0, "beta2": 0.98}' --do_train …

nsp_weight   the factor of the NSP loss in the total loss
beta2        the decay of the optimizer's second moments
"""

import json
import sys
from contextlib import ExitStack
from unittest import mock

from measuring import ROOT  # noqa: F401 (puts the repository's root on the path)

# isort: split
from common import cli


def main(argv=None) -> None:
    changes, *flags = sys.argv[1:] if argv is None else argv
    import run_pretraining

    with ExitStack() as stack:
        for name, value in json.loads(changes).items():
            stack.enter_context(CHANGES[name](value))
        run_pretraining.main(flags)


def with_nsp_weight(weight: float):
    import modeling

    summed = modeling.summed

    def weighted(mlm_loss, nsp_loss):
        return {**summed(mlm_loss, nsp_loss), "loss": mlm_loss + weight * nsp_loss}

    return mock.patch.object(modeling, "summed", weighted)


def with_beta2(beta2: float):
    from optim import build

    choose_lamb = build.choose_lamb

    def choose(*arguments):
        optimizer_class, description = choose_lamb(*arguments)
        return (lambda groups, **options: optimizer_class(groups, **{**options, "betas": (0.9, beta2)}),
                f"{description}, beta2 {beta2}")

    return mock.patch.object(build, "choose_lamb", choose)


CHANGES = {"nsp_weight": with_nsp_weight, "beta2": with_beta2}

if __name__ == "__main__":
    cli.run(main)
