"""run_pretraining.py, in which rank 1 loses its connection while the process group ends, and rank 0 waits for it."""

import os
import time

import torch.distributed as dist

import run_pretraining
from common import cli


def destroy() -> None:
    if os.environ["RANK"] == "1":
        raise RuntimeError("the connection is lost")
    time.sleep(10_000)


dist.destroy_process_group = destroy
cli.run(run_pretraining.main)
