"""scripts/smoke_hpu.sh, on the stand-in for Gaudi's software."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import gaudi, ranks, samples
from tests.support.ranks import needs_mpirun

CLAIMS = {
    "modes": ("lazy mode, against cpu", "graphs compiled after step 3: 0 ", "ops that ran on the host: 0 ",
              "lazy with HPU graphs, against", "eager, against", "compiled, against",
              "compiled without compiled autograd, against", "FusedLamb against NVLAMB", "bf16 op lists against fp32"),
    "cache": ("second start with the recipe cache",),
    "cards": ("all-reduce over 2 cards, {}: right on every rank, cards (HLS_MODULE_ID) 0 1", "dropout's masks, {}",
              "over {} against one, flat", "over {} against one, 16 bits", "over {} against one, DDP, eager",
              "over {} against one, DDP, compiled", "over {} against one, ZeRO, FusedLamb",
              "over {} against one, checkpoint_activations", "over {} against one, FusedLamb, bf16",
              "a killed rank leaves no process, {}"),
    "checkpoints": ("saved in mode lazy, continued in mode eager", "saved in mode lazy, continued in mode compiled",
                    "saved in mode eager, continued in mode lazy", "saved in mode compiled, continued in mode lazy",
                    "resumed with dropout against uninterrupted"),
    "times": ("bf16, lazy: ", "bf16, lazy with HPU graphs: ", "bf16, compiled: ",
              "bf16, compiled with compiled autograd: "),
    "shapes": ("8 × 512 tokens, unpacked: peak", "16 × 512 tokens, packed: peak", "on 2 cards for three steps: peak")}
SOFTWARE = ("releases: torch ", "signature: torch.save(", "signature: torch.distributed.new_group(",
            "signature: FusedLamb(", "cards: 2")
BEYOND_THE_STANDIN = "DDP, lazy"  # PyTorch's own lazy tensors do not go through DDP's reducer


@needs_mpirun
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_smoke_run_passes_every_check_on_two_cards(tmp_path, request):
    """Half of its checks; all, with both launchers, with --every_command."""
    every = request.config.getoption("--every_command")
    groups = list(CLAIMS) if every else ["modes", "cache", "cards"]
    config = samples.write_config(tmp_path / "tiny.json", max_position_embeddings=512)
    environment = gaudi.environment(cards=2, PYTHON=sys.executable, PT_HPU_LAZY_MODE="0",  # each run sets its own
                                    PATH=f"{Path(ranks.MPIRUN).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(["bash", "scripts/smoke_hpu.sh", *groups, *([] if every else ["--launcher=mpirun"]),
                           f"--config_file={config}", f"--large_config_file={config}", "--train_batch_size=8",
                           f"--folder={tmp_path}"], cwd=gaudi.ROOT, env=environment, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    launchers = ("torchrun", "mpirun") if every else ("mpirun",)
    failed = [line for line in lines if line.startswith("FAIL")]
    assert len(failed) == len(launchers) and all(BEYOND_THE_STANDIN in line for line in failed), failed
    assert done.returncode == 1 and lines[-1] == f"{len(launchers)} failed", done.stderr
    claims = [claim.format(name) for name in launchers for group in groups for claim in CLAIMS[group]]
    for claim in {*SOFTWARE, *claims}:
        assert sum(claim in line and line.startswith(("PASS", "NOTE")) for line in lines) == 1, claim


def test_smoke_run_without_a_card_fails_in_a_line(tmp_path):
    done = gaudi.run(["scripts/smoke_hpu.py", f"--folder={tmp_path}"], cards=0)
    assert done.returncode == 1 and not done.stderr
    assert "FAIL  software: scripts/smoke/on_card.py: error: --use_habana: Gaudi's software is installed, but it " \
           "finds no card" in done.stdout


def test_an_unknown_group_is_named(tmp_path):
    done = gaudi.run(["scripts/smoke_hpu.py", "graphs"])
    assert done.returncode == 2 and "graphs is not one of modes, checkpoints" in done.stderr
