"""The recipe for 32 cards of four servers, scaled down to 8 ranks, over ssh between network namespaces."""

import os
import sys
from pathlib import Path

import pytest

from tests.support import ranks, servers
from tests.support.ranks import TRAIN, flags, needs_mpirun

STEPS = 30
RUN = {"max_steps": STEPS, "learning_rate": 0.02}
pytestmark = [pytest.mark.slow, pytest.mark.skipif(servers.problem() is not None, reason=str(servers.problem()))]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder with config and data, and what one rank made of them: one.json."""
    folder = ranks.write_workspace(tmp_path_factory.mktemp("servers"))
    assert ranks.run([*TRAIN, *flags(1, "one", **RUN)], folder).returncode == 0
    return folder


def recipe(workspace: Path, count: int, output: str) -> list:
    """The recipe with a small model, the data of the workspace and the batch of `count` ranks."""
    return ["bash", ranks.ROOT / "scripts/bert_large_32_cards.sh", "1",
            *flags(count, str(workspace / output), input_dir=workspace / "data", config_file=workspace / "config.json",
                   skip_checkpoint=None, **RUN)]


def variables(workspace: Path, net: servers.Servers, cards: int) -> dict[str, str]:
    """The variables of the recipe on servers with so many cards each; no interface is named."""
    return {"HOSTS": ",".join(f"{address}:{cards}" for address in net.addresses), "CARDS_PER_SERVER": str(cards),
            "MASTER_ADDR": net.addresses[0], "MASTER_PORT": "12345", "DEVICE": "cpu", "PRECISION": "fp32",
            "PYTHON": sys.executable, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SSH_OPTIONS": net.ssh_options, "MAPPING": f"--bind-to none --map-by ppr:{cards}:node"}


def assert_trained(workspace: Path, output: str) -> None:
    """The losses fall, and are those of one rank, as near as gradients of 16 bits come."""
    found = ranks.figures(workspace / f"{output}.json", "step_mean_loss")
    assert found == pytest.approx(ranks.figures(workspace / "one.json", "step_mean_loss"), abs=3e-3)
    assert len(found) == STEPS and found[STEPS] < found[1] - 0.1
    assert (workspace / output / f"ckpt_{STEPS}.pt").exists()


@needs_mpirun
@pytest.mark.skipif(" " in sys.prefix, reason="mpirun does not quote its own folder on other servers")
def test_mpirun_trains_eight_ranks_on_four_servers(workspace, tmp_path):
    with servers.running(4, tmp_path) as net:
        command = net.inside(0, *recipe(workspace, 8, "eight"))
        done = ranks.run(command, tmp_path, **variables(workspace, net, cards=2))
        received = [net.received(server) for server in range(4)]
    assert done.returncode == 0, done.stdout
    assert "ranks: 8; reduction of gradients: one all-reduce" in done.stdout
    assert_trained(workspace, "eight")
    assert min(received) > 2 * STEPS * 732_000  # the word embeddings' gradient alone, 2 bytes each


def test_torchrun_trains_on_two_servers(workspace, tmp_path):
    (tmp_path / "other").mkdir()
    with servers.running(2, tmp_path) as net:
        command, settings = recipe(workspace, 2, "two"), {**variables(workspace, net, cards=1), "LAUNCHER": "torchrun"}
        with ranks.started(net.inside(1, *command), tmp_path / "other", NODE_RANK="1", **settings), \
                ranks.started(net.inside(0, *command), tmp_path, NODE_RANK="0", **settings) as first:
            done = first.finish()
    assert done.returncode == 0, done.stdout
    assert_trained(workspace, "two")
