"""torchrun --nnodes 1:4 --max_restarts 3 on three servers in network namespaces, of which one dies."""

import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

import run_pretraining
from parallel import elastic
from tests.support import ranks, servers
from tests.support.ranks import TRAIN, flags
from training.trainer import BatchPlan

STEPS, PORT = 24, 29400
RUN = {"max_steps": STEPS, "skip_checkpoint": None, "num_steps_per_checkpoint": 8, "collective_timeout": 60}
ON_THREE = {"train_batch_size": 8, "gradient_accumulation_steps": 4}  # 24 rows a step, …
ON_TWO = {"train_batch_size": 12, "gradient_accumulation_steps": 6}  # … and here


def agent(net: servers.Servers, server: int, *command) -> list[str]:
    """torchrun on a server.  Those that hear nothing of one take it for dead after 10 seconds in place of 15."""
    settings = {"is_host": server == 0, "last_call_timeout": 6, "keep_alive_interval": 2, "keep_alive_max_attempt": 5}
    return net.inside(server, sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:4", "--nproc-per-node", 1,
                      "--max_restarts", 3, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{net.addresses[0]}:{PORT}",
                      "--rdzv-conf", ",".join(f"{name}={value}" for name, value in settings.items()),
                      "--local-addr", net.addresses[server], "--no-python", *command)


def kill_server(net: servers.Servers, server: int) -> None:
    shown = subprocess.run(["ip", "netns", "pids", net.name(server)], check=True, capture_output=True).stdout
    for process in map(int, shown.split()):
        os.kill(process, signal.SIGKILL)


def outputs(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("server_*.txt")))


@pytest.mark.slow
@pytest.mark.skipif(servers.problem() is not None, reason=str(servers.problem()))
def test_a_run_goes_on_without_a_server_that_died_as_if_resumed_by_hand(tmp_path):
    """The global batch stays, and no row is lost or used twice: the losses are also those of one rank."""
    ranks.write_workspace(tmp_path)
    with servers.running(3, tmp_path) as net, ExitStack() as stack:
        jobs = [stack.enter_context(ranks.started(agent(net, server, *TRAIN, *flags(3, "out", **RUN, **ON_THREE)),
                                                  tmp_path, f"server_{server}.txt")) for server in range(3)]
        first = jobs[0]
        first.wait_for("step 10 ")
        kill_server(net, 2)
        done = [job.finish() for job in jobs[:2]]
    printed = outputs(tmp_path)
    assert [job.returncode for job in done] == [0, 0], printed
    assert "ranks: 3;" in printed and "ranks: 2;" in printed
    assert ("global batch: 24 rows a step on 2 ranks, as before the restart: 6 accumulation steps, 4 by the flags"
            in printed)
    restart, = map(int, re.findall(r"from step ([1-9]\d*) of", printed))
    (tmp_path / "hand").mkdir()
    shutil.copy(tmp_path / f"out/ckpt_{restart}.pt", tmp_path / "hand")
    by_hand = ranks.run(ranks.torchrun(2, *TRAIN, *flags(2, "hand", **RUN, **ON_TWO, resume_from_checkpoint=True)),
                        tmp_path)
    assert by_hand.returncode == 0, by_hand.stdout
    for name in ("step_mean_loss", "gradient_norm"):
        found, resumed = (ranks.figures(tmp_path / f"{output}.json", name) for output in ("out", "hand"))
        assert len(resumed) == STEPS - restart
        assert {step: found[step] for step in resumed} == resumed, name
    one = ranks.run([*TRAIN, *flags(1, "one", **RUN, train_batch_size=24, gradient_accumulation_steps=12)], tmp_path)
    assert one.returncode == 0, one.stdout
    assert ranks.figures(tmp_path / "out.json", "step_mean_loss") == pytest.approx(
        ranks.figures(tmp_path / "one.json", "step_mean_loss"), abs=1e-4)


def test_each_start_in_one_store_has_a_name_of_its_own():
    """The store of torchrun's agent outlives the ranks: what the ranks of an earlier start wrote is still there."""
    host = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))

    def connection() -> dist.Store:
        return dist.TCPStore("localhost", host.port, is_master=False, timeout=timedelta(seconds=30))

    def names(world_size: int) -> set[str]:
        with ThreadPoolExecutor(world_size) as pool:
            found = list(pool.map(lambda rank: elastic.name_of_start(
                connection(), connection() if rank == 0 else None, world_size, rank), reversed(range(world_size))))
        host.set(f"{found[0]}/{elastic.ALL_CONNECTED}", "")
        return set(found)

    first, second, third = names(3), names(2), names(4)
    assert len(first) == len(second) == len(third) == 1
    assert len(first | second | third) == 3


@pytest.mark.parametrize("world_size, accumulation, line", [
    (4, 4, ""),
    (2, 8, "global batch: 32 rows a step on 2 ranks, as before the restart: 8 accumulation steps, 4 by the flags"),
    (3, 5, "global batch: 30 rows a step on 3 ranks, the nearest to the 32 of before the restart: 5 accumulation "
           "steps, 4 by the flags"),
    (8, 2, "global batch: 32 rows a step on 8 ranks, as before the restart: 2 accumulation steps, 4 by the flags"),
    (32, 1, "global batch: 64 rows a step on 32 ranks, the nearest to the 32 of before the restart: 1 accumulation "
            "steps, 4 by the flags"),
])
def test_the_global_batch_is_kept_as_far_as_it_divides(world_size, accumulation, line):
    """Of a run that began on 4 ranks.  A checkpoint names the rows that a step is to have, not those that it had."""
    args = SimpleNamespace(train_batch_size=8, gradient_accumulation_steps=4)
    checkpoint = SimpleNamespace(contents={"step_rows": 32}, path="ckpt_10.pt")
    plan, printed = run_pretraining.plan_of_restart(BatchPlan.from_flags(args, 1.0, world_size), checkpoint, world_size)
    assert (plan.accumulation_steps, plan.micro_batch_size, plan.step_rows, printed) == (accumulation, 2, 32, line)
