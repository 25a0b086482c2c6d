"""The commands for 8 cards, as users type them behind mpirun, on the stand-in for Gaudi's software.

Eight ranks on few cores take long, so two commands run as tests, one in lazy mode and one compiled; all ten in both
modes, the second phases after the first ones, with

    python -m pytest tests/parallel/test_eight_card_commands.py --every_command
"""

import shutil
from pathlib import Path

import pytest

from tests.support import gaudi, ranks, samples, typed_commands
from tests.support.ranks import needs_mpirun
from tests.support.typed_commands import STEPS

COMMANDS = typed_commands.read("eight_card_commands.txt")
CARDS = 8
ALWAYS = (("8 cards, bf16, unpacked", True), ("8 cards, 1.2B parameters, ZeRO, bf16, packed", False))  # kind, compiled


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    folder = typed_commands.write_workspace(tmp_path_factory.mktemp("eight_cards"))
    for path in gaudi.ROOT.glob("ops_*.txt"):  # the commands look for them in the folder in which they are typed
        shutil.copy(path, folder)
    return folder


def run(kind: str, phase: str, folder: Path, compiled: bool) -> None:
    """Run the command of a kind and phase, and check what it says, logs and saves."""
    name = next(name for name in COMMANDS if name.startswith(f"{kind}, {phase}"))
    command = typed_commands.small(COMMANDS[name], folder, phase, accumulation=1)
    if compiled:
        command = [*(word for word in command if word != "--use_lazy_mode=True"), "--use_torch_compile"]
    record = folder / f"{phase}.record"
    done = ranks.run(ranks.mpirun(CARDS, ranks.TRAIN[0], ranks.ROOT / command[0], *command[1:]), folder,
                     **gaudi.environment(record=record, cards=CARDS))
    assert done.returncode == 0, done.stdout[-3000:]
    assert "ranks: 8; reduction of gradients: one all-reduce after the last micro-batch, bfloat16" in done.stdout
    losses = samples.losses(folder / f"{phase}.json")
    assert sorted(losses) == list(range(1, STEPS + 1))
    calls = gaudi.calls(record)
    assert sum(call["call"] == "FusedLamb.step" for call in calls) == STEPS * CARDS
    in_16_bits = [call for call in calls if call.get("collective") == "allreduce" and call["dtype"] == "torch.bfloat16"]
    assert len(in_16_bits) == STEPS * CARDS
    assert sum(call["call"] == "enable_compiled_autograd" for call in calls) == CARDS * compiled
    assert any(call["call"] == "mark_step" for call in calls) != compiled
    saved = 7038 * (phase == "phase 2") + STEPS
    assert (folder / "checkpoints" / f"ckpt_{saved}.pt").exists()
    if "ZeRO" in kind:
        assert len(list((folder / "checkpoints" / f"ckpt_{saved}.optim").glob("rank_*_of_8.pt"))) == CARDS


def test_there_are_ten_commands_in_pairs_of_phases():
    assert len(COMMANDS) == 10 and len(typed_commands.kinds(COMMANDS)) == 5
    assert {kind for kind, _ in ALWAYS} < set(typed_commands.kinds(COMMANDS))


@needs_mpirun
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compiled", [False, True], ids=["lazy", "compile"])
@pytest.mark.parametrize("kind", typed_commands.kinds(COMMANDS))
def test_the_eight_card_commands_run_as_they_stand(workspace, tmp_path, kind, compiled, request):
    every = request.config.getoption("--every_command")
    if (kind, compiled) not in ALWAYS and not every:
        pytest.skip("only with --every_command")
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    run(kind, "phase 1", tmp_path, compiled)
    if every:
        checkpoints = tmp_path / "checkpoints"
        (checkpoints / f"ckpt_{STEPS}.pt").rename(checkpoints / "ckpt_7038.pt")  # what phase 2 starts from
        run(kind, "phase 2", tmp_path, compiled)
