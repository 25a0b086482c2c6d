"""run_pretraining.py, in which the second micro-batch of step 2 gives a loss that is not finite, on rank 1 alone."""

import itertools
import os

import modeling
import run_pretraining
from common import cli
from tests.support.ranks import GLOBAL_BATCH

forward = modeling.BertForPreTraining.forward
MICRO_BATCHES = GLOBAL_BATCH // 2 // 2  # a step, of 2 rows, on each of 2 ranks
calls = itertools.count(1)


def poisoned(self, batch):
    outputs = forward(self, batch)
    bad = os.environ["OMPI_COMM_WORLD_RANK"] == "1" and next(calls) == MICRO_BATCHES + 2
    return outputs | {"loss": outputs["loss"] * float("inf")} if bad else outputs


modeling.BertForPreTraining.forward = poisoned
cli.run(run_pretraining.main)
