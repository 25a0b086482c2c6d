"""The commands for one card, as users type them, on the stand-in for Gaudi's software."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.support import gaudi, samples, typed_commands
from tests.support.typed_commands import STEPS

COMMANDS = typed_commands.read("one_card_commands.txt")
RELEASES = {"1 card, bf16, unpacked": "1.12", "1 card, fp32, unpacked": "1.20", "1 card, bf16, packed": "1.21",
            "1 card, Gaudi2, bf16, packed": "1.23"}
ACCUMULATION = 6
BF16_OPS = ["add", "addmm", "bmm", "dropout", "gelu", "layer_norm", "linear", "matmul", "mm", "rsub", "softmax"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return typed_commands.write_workspace(tmp_path_factory.mktemp("one_card"))


def test_there_are_eight_commands_in_pairs_of_phases():
    assert len(COMMANDS) == 8
    assert typed_commands.kinds(COMMANDS) == list(RELEASES)


@pytest.mark.parametrize("compiled", [False, True], ids=["lazy", "compile"])
@pytest.mark.parametrize("kind", RELEASES)
def test_both_phases_of_a_one_card_command_run_as_they_stand(workspace, tmp_path, kind, compiled):
    """In compile mode with --use_torch_compile behind them, on the newest release."""
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "checkpoints"
    run_recorded(kind, "phase 1", tmp_path, compiled)
    (checkpoints / f"ckpt_{STEPS}.pt").rename(checkpoints / "ckpt_7038.pt")  # what phase 2 starts from
    run_recorded(kind, "phase 2", tmp_path, compiled)
    assert (checkpoints / f"ckpt_{7038 + STEPS}.pt").exists()


def run_recorded(kind: str, phase: str, folder: Path, compiled: bool) -> None:
    """Run the command of a kind and phase, and check its record and its log."""
    name = next(name for name in COMMANDS if name.startswith(f"{kind}, {phase}"))
    record = folder / f"{phase}.record"
    command = typed_commands.small(COMMANDS[name], folder, phase, ACCUMULATION)
    done = gaudi.run([*command, *["--use_torch_compile"] * compiled], record=record,
                     release="1.23" if compiled else RELEASES[kind])
    assert done.returncode == 0, done.stderr[-2000:]
    if compiled:
        check_compiled_record(gaudi.calls(record))
        return
    accumulation = int(re.search(r"(\d+) accumulation steps", done.stdout).group(1))
    assert accumulation == ACCUMULATION if "unpacked" in kind else 2 <= accumulation < ACCUMULATION
    check_record(gaudi.calls(record), kind, accumulation)
    line = next(line for line in samples.log_lines(folder / f"{phase}.json") if "step_loss" in line["data"])
    assert {"graph_compilation", "cpu_fallback", "memory_allocated", "max_memory_allocated"} <= set(line["data"])
    assert line["data"]["cpu_fallback"] == 0


def check_record(calls: list[dict], kind: str, accumulation: int) -> None:
    """What the record of a run must show."""
    names = [call["call"] for call in calls]
    assert names[:3] == ["import torch", "import habana_frameworks.torch",
                         "import habana_frameworks.torch.distributed.hccl"]
    bf16, hmp = "bf16" in kind, RELEASES[kind] == "1.12"
    for call in calls[:2]:
        assert call["PT_HPU_LAZY_MODE"] == "1"
        assert call.get("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST") == (BF16_OPS if bf16 else None)
        assert ("cross_entropy_loss" in call.get("PT_HPU_AUTOCAST_FP32_OPS_LIST", [])) == bf16
    steps = [name for name in names if name in ("mark_step", "FusedLamb.step")]
    assert steps == (["mark_step"] * accumulation + ["FusedLamb.step", "mark_step"]) * STEPS
    assert all(call["dtypes"] == ["torch.float32"] for call in calls if call["call"] == "FusedLamb.step")
    converted = [call for call in calls if call["call"] == "hmp.convert"]
    entered = [call for call in calls if call["call"] == "torch.autocast" and call["enabled"]]
    assert len(converted) == (1 if bf16 and hmp else 0)
    assert len(entered) == (STEPS * accumulation if bf16 and not hmp else 0)
    assert all((call["device"], call["dtype"]) == ("hpu", "torch.bfloat16") for call in entered)
    if converted:
        assert converted[0]["opt_level"] == "O1"
        assert converted[0]["bf16"] == (gaudi.ROOT / "ops_bf16_bert_pt.txt").read_text().split()
        assert converted[0]["fp32"] == (gaudi.ROOT / "ops_fp32_bert_pt.txt").read_text().split()
        check_casts_are_off_around_each_step(calls)


def check_casts_are_off_around_each_step(calls: list[dict]) -> None:
    calls = [call for call in calls if call["call"] != "FusedLamb.mark_step"]
    for place, call in enumerate(calls):
        if call["call"] == "FusedLamb.step":
            assert calls[place - 1] == {"call": "hmp.disable_casts", "entered": True}
            assert calls[place + 1] == {"call": "hmp.disable_casts", "entered": False}


def check_compiled_record(calls: list[dict]) -> None:
    assert all(call["PT_HPU_LAZY_MODE"] == "0" for call in calls[:2])
    names = [call["call"] for call in calls]
    assert names.count("enable_compiled_autograd") == 1 and names.count("FusedLamb.step") == STEPS
    assert "mark_step" not in names


@pytest.mark.parametrize("flag, compiled", [("--use_lazy_mode=False", False), ("--use_torch_compile", True)])
def test_eager_and_compiled_mode_mark_no_steps(workspace, tmp_path, flag, compiled):
    command = COMMANDS["1 card, Gaudi2, bf16, packed, phase 1"].replace("--use_fused_lamb ", "")
    record = tmp_path / "record"
    shutil.copytree(workspace, tmp_path, dirs_exist_ok=True)
    done = gaudi.run([*typed_commands.small(command, tmp_path, "run", ACCUMULATION), flag], record=record)
    assert done.returncode == 0, done.stderr[-2000:]
    calls = gaudi.calls(record)
    assert [call["PT_HPU_LAZY_MODE"] for call in calls[:2]] == ["0", "0"]
    assert {"mark_step", "FusedLamb"}.isdisjoint(call["call"] for call in calls)
    assert "eager mode" in done.stdout and "(--use_fused_lamb is faster)" in done.stdout
    assert ("NVLAMB, compiled by hpu_backend" in done.stdout) == compiled
    saved = torch.load(tmp_path / "checkpoints" / f"ckpt_{STEPS}.pt", weights_only=True)
    assert "bert.embeddings.word_embeddings.weight" in saved["model"], "no prefix of torch.compile"
