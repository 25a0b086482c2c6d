"""scripts/smoke_hpu.sh, on the stand-in for Gaudi's software."""

import subprocess
import sys

import pytest

from tests.support import gaudi, samples


@pytest.mark.slow
def test_smoke_run_passes_every_check_on_two_cards(tmp_path):
    config = samples.write_config(tmp_path / "config.json", max_position_embeddings=128)
    environment = gaudi.environment(cards=2, PYTHON=sys.executable, PT_HPU_LAZY_MODE="0")  # each run sets its own
    done = subprocess.run(["bash", "scripts/smoke_hpu.sh", f"--config_file={config}", "--train_batch_size=8",
                           f"--folder={tmp_path}"], cwd=gaudi.ROOT, env=environment, text=True, capture_output=True,
                          stdin=subprocess.DEVNULL)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert done.returncode == 0 and done.stdout.endswith("all passed\n"), done.stderr
    for claim in ("lazy mode, against cpu", "graphs compiled after step 3: 0", "ops that ran on the host: 0",
                  "eager, against", "compiled, against", "FusedLamb against NVLAMB", "bf16 op lists against fp32",
                  "seconds per step", "all-reduce over 2 cards: right", "training on 2 cards against one"):
        assert sum(claim in line for line in lines) == 1, claim


def test_smoke_run_without_a_card_fails_each_check_in_a_line(tmp_path):
    done = gaudi.run(["scripts/smoke_hpu.py", "cards"], cards=0)
    assert done.returncode == 2 and "finds no card" in done.stderr and len(done.stderr.splitlines()) == 1
