"""run_pretraining.py with changes that it has no flag for.  The benchmarks run it in a child process.

    python benchmarks/changed_training.py '{"nsp_weight": 0.0, "beta2": 0.98}' --do_train …

nsp_weight   the factor of the NSP loss in the total loss
beta2        the decay of the optimizer's second moments
optimizer    adamw in place of LAMB, with the same clipping, betas, weight decay and schedule
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


def with_optimizer(name: str):
    from optim import build

    optimizer_class = {"adamw": clipped_adamw}[name]()
    return mock.patch.object(build, "choose_lamb", lambda *arguments: (optimizer_class, f"{name}, fused, clipped"))


def clipped_adamw() -> type:
    """PyTorch's fused AdamW as a class that clips, and that tells the log what LAMB tells it."""
    import torch

    from lamb import SkipCounts

    class ClippedAdamW(SkipCounts, torch.optim.AdamW):
        def __init__(self, groups, max_grad_norm: float, **options):
            super().__init__(groups, fused=True, **options)
            self.max_grad_norm = max_grad_norm
            self.start_counts(torch.device("cpu"))

        def step(self, closure=None):
            weights = [weight for group in self.param_groups for weight in group["params"]]
            self.gradient_norm = torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm)
            self.count_skips(torch.zeros(()))
            return super().step(closure)

    return ClippedAdamW


CHANGES = {"nsp_weight": with_nsp_weight, "beta2": with_beta2, "optimizer": with_optimizer}

if __name__ == "__main__":
    cli.run(main)
