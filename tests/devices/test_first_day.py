"""What a user meets first on a Gaudi server, on the stand-in for Gaudi's software: the environment, failures, modes."""

import os
import sys
import time
from pathlib import Path

import pytest

from tests.support import gaudi, ranks, samples, small_run
from tests.support.ranks import needs_mpirun, torchrun

LAZY, EAGER = {"PT_HPU_LAZY_MODE": "1"}, {"PT_HPU_LAZY_MODE": "0"}
TRAIN = gaudi.ROOT / "run_pretraining.py"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = small_run.write_workspace(tmp_path_factory.mktemp("first_day"))
    samples.write_config(folder / "config.json", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    return folder


def flags(output: str, **changes) -> list[str]:
    return small_run.flags(**{"output_dir": output, "json_summary": f"{output}.json", "no_cuda": None,
                              "use_habana": True, "max_steps": 2, "skip_checkpoint": True, **changes})


def refusal(done) -> str:
    """The one line with which a command ended."""
    assert done.returncode == 2, done.stderr
    line, = done.stderr.splitlines()
    return line


@pytest.mark.parametrize("mode", [LAZY, EAGER], ids=["lazy", "eager"])
@pytest.mark.parametrize("failure", ["AssertionError: torch 2.9.0 does not match", "AttributeError: no attribute 'x'",
                                     "OSError: libSynapse.so: cannot open shared object file", "RuntimeError: broken"])
def test_a_plugin_that_fails_is_one_line_with_the_releases(tmp_path, failure, mode):
    (tmp_path / "hl-smi").write_text("#!/bin/sh\necho 1.22.0-740\n")
    (tmp_path / "hl-smi").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = gaudi.run([TRAIN, *flags("failing")], GAUDI_STANDIN_FAILS=failure, PATH=path, **mode)
    line = refusal(done)
    assert failure.partition(": ")[2] in line
    assert "habana-torch-plugin 1.23.0" in line and "driver 1.22.0-740" in line and "torch 2." in line


def test_a_plugin_that_fails_in_a_run_on_the_cpu_is_one_line_too():
    done = gaudi.run([TRAIN, *flags("failing", use_habana=None, no_cuda=True)],
                     GAUDI_STANDIN_FAILS="AssertionError: other release", **EAGER)
    assert "PyTorch cannot be imported: other release" in refusal(done)


@pytest.mark.parametrize("command", [
    ["fill_mask.py", "--checkpoint=c", "--config_file=c", "--vocab_file=v", "[MASK]"],
    ["export_to_huggingface.py", "--checkpoint=c", "--config_file=c", "--vocab_file=v", "--output_dir=nowhere"],
    ["evaluate.py", "--config_file=c", "--eval_dir=d", "--no_cuda"]])
def test_commands_on_the_cpu_report_a_plugin_that_fails_in_one_line(command):
    done = gaudi.run(command, GAUDI_STANDIN_FAILS="AttributeError: no local version", **EAGER)
    assert "PyTorch cannot be imported: no local version (torch 2." in refusal(done)


@pytest.mark.parametrize("mode", [LAZY, EAGER], ids=["lazy", "eager"])
def test_several_servers_without_master_addr_are_refused_at_once(workspace, mode):
    """In eager mode the plugin sets MASTER_ADDR to localhost within `import torch`."""
    began = time.monotonic()
    done = gaudi.run([TRAIN, *flags("lost")], cwd=workspace, OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_SIZE="2",
                     OMPI_COMM_WORLD_LOCAL_RANK="0", OMPI_COMM_WORLD_LOCAL_SIZE="1", **mode)
    assert "MASTER_ADDR must name the server of rank 0" in refusal(done)
    assert time.monotonic() - began < 60, "less than the ten minutes of --collective_timeout"


@pytest.mark.parametrize("variables, words, card", [
    ({}, [], None),
    ({}, ["--local_rank=3"], "3"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}, [], "2"),
    ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "1", "HABANA_VISIBLE_MODULES": "4,6"}, [], "6"),
    ({"HABANA_VISIBLE_MODULES": "4,6"}, ["--local_rank=1"], "6"),
    ({"HLS_MODULE_ID": "7"}, ["--local_rank=1"], "7"),
])
@pytest.mark.parametrize("mode", [LAZY, EAGER], ids=["lazy", "eager"])
def test_the_card_is_chosen_before_the_plugin_is_loaded(workspace, tmp_path, variables, words, card, mode):
    record = tmp_path / "record"
    gaudi.run([TRAIN, *flags("card", input_dir="nowhere"), *words], cwd=workspace, record=record, cards=8, **variables,
              **mode)
    loaded, = (call for call in gaudi.calls(record) if call["call"].endswith(".hccl"))
    assert loaded["card"] == card


def test_a_local_rank_without_a_card_is_refused(workspace):
    done = gaudi.run([TRAIN, *flags("card"), "--local_rank=2"], cwd=workspace, HABANA_VISIBLE_MODULES="4,6")
    assert "local rank 2, but HABANA_VISIBLE_MODULES=4,6 names 2 cards" in refusal(done)


def test_ranks_in_different_modes_are_refused_by_name(workspace):
    command = torchrun(2, "bash", "-c", 'PT_HPU_LAZY_MODE=$LOCAL_RANK exec "$@"', "bash", sys.executable, TRAIN)
    done = ranks.run([*command, *flags("mixed", collective_timeout=20)], workspace, **gaudi.environment(cards=2))
    assert done.returncode != 0
    assert "rank 1 and rank 0 differ: its mode (PT_HPU_LAZY_MODE) is 1, lazy, on rank 0 0, eager" in done.stdout


def test_ranks_of_different_releases_are_refused_by_name(workspace, tmp_path):
    other = tmp_path / "habana_torch_plugin-1.22.0.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: habana-torch-plugin\nVersion: 1.22.0\n")
    choose = f'[ $LOCAL_RANK = 1 ] && export PYTHONPATH={tmp_path}:$PYTHONPATH; exec "$@"'
    command = torchrun(2, "bash", "-c", choose, "bash", sys.executable, TRAIN)
    done = ranks.run([*command, *flags("mixed", collective_timeout=20)], workspace, **gaudi.environment(cards=2))
    assert done.returncode != 0
    assert "rank 1 and rank 0 differ: Gaudi's software is 1.22.0, on rank 0 1.23.0" in done.stdout


def losses_on_two_ranks(workspace, output: str, **changes) -> dict[int, float]:
    halves = {"train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 4}
    done = ranks.run(torchrun(2, sys.executable, TRAIN, *flags(output, **halves, **changes)), workspace,
                     **gaudi.environment(cards=2, record=workspace / f"{output}.record"))
    assert done.returncode == 0, done.stdout[-3000:]
    return samples.losses(workspace / f"{output}.json")


@pytest.mark.parametrize("opt_out", [False, True])
def test_compiled_mode_trains_with_ddp_on_two_ranks(workspace, opt_out):
    alone = flags("alone", max_steps=4, gradient_accumulation_steps=4)
    assert gaudi.run([TRAIN, *alone], cwd=workspace).returncode == 0
    output = "ddp_without" if opt_out else "ddp"
    found = losses_on_two_ranks(workspace, output, use_torch_compile=True, no_compiled_autograd=opt_out)
    assert found == pytest.approx(samples.losses(workspace / "alone.json"), abs=1e-4)
    names = [call["call"] for call in gaudi.calls(workspace / f"{output}.record")]
    assert names.count("enable_compiled_autograd") == (0 if opt_out else 2)
    assert "mark_step" not in names


def test_a_release_without_compiled_autograd_compiles_without(workspace):
    done = gaudi.run([TRAIN, *flags("old", use_torch_compile=True)], cwd=workspace, release="1.19")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "its backward pass too, without compiled autograd, which this release does not have" in done.stdout


def test_hpu_graphs_are_recorded_by_micro_step_and_change_no_loss(workspace, tmp_path):
    record = tmp_path / "record"
    for output, graphs in (("with_graphs", True), ("without_graphs", False)):
        done = gaudi.run([TRAIN, *flags(output, use_hpu_graphs=graphs)], cwd=workspace,
                         **({"record": record} if graphs else {}))
        assert done.returncode == 0, done.stderr[-2000:]
    calls = gaudi.calls(record)
    assert [call["have_grad_accumulation"] for call in calls if call["call"] == "ModuleCacher"] == [True]
    assert [call["iteration"] for call in calls if call["call"] == "HPU graph"] == [0, 1] * 2
    with_graphs, without = (samples.losses(workspace / f"{name}_graphs.json") for name in ("with", "without"))
    assert with_graphs == pytest.approx(without, abs=1e-6)


@pytest.mark.parametrize("changes, variables, message", [
    ({"checkpoint_activations": True}, {}, "--use_hpu_graphs excludes --checkpoint_activations"),
    ({"mlm_loss_chunk": 4}, {}, "--use_hpu_graphs excludes --checkpoint_activations and --mlm_loss_chunk"),
    ({"eval_dir": "held_out"}, {}, "and --eval_dir (evaluate.py evaluates checkpoints)"),
    ({"use_torch_compile": True}, {}, "--use_hpu_graphs is for --use_habana in lazy mode"),
    ({"use_lazy_mode": "False"}, {}, "--use_hpu_graphs is for --use_habana in lazy mode"),
    ({"use_habana": None}, {}, "--use_hpu_graphs is for --use_habana in lazy mode"),
    ({}, EAGER, "--use_hpu_graphs: no HPU graphs: they need lazy mode"),
    ({}, {"release": "1.7"}, "--use_hpu_graphs: no HPU graphs: this release of Gaudi's software has none"),
])
def test_hpu_graphs_are_refused_where_they_cannot_work(workspace, changes, variables, message):
    done = gaudi.run([TRAIN, *flags("refused", use_hpu_graphs=True, **changes)], cwd=workspace, **variables)
    assert message in refusal(done)


POISONED = """
import itertools, sys
import modeling, run_pretraining
from common import cli
forward, calls = modeling.BertForPreTraining.forward, itertools.count(1)
def poisoned(self, batch):
    outputs = forward(self, batch)
    bad = next(calls) == 4  # in the second step
    return outputs | {"loss": (outputs["loss"] - outputs["loss"]).log()} if bad else outputs
modeling.BertForPreTraining.forward = poisoned
cli.run(run_pretraining.main)
"""


@pytest.mark.parametrize("mode", [LAZY, EAGER], ids=["lazy", "eager"])
def test_a_loss_that_is_not_finite_does_not_ruin_the_weights_under_fused_lamb(workspace, tmp_path, mode):
    program = tmp_path / "poisoned.py"
    program.write_text(POISONED)
    done = gaudi.run([program, *flags("poisoned", use_fused_lamb=True, max_steps=4)], cwd=workspace,
                     PYTHONPATH=f"{gaudi.STANDIN}{os.pathsep}{gaudi.ROOT}", **mode)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line["data"] for line in samples.log_lines(workspace / "poisoned.json") if "step_loss" in line["data"]]
    assert [line["skipped_steps"] for line in lines] == [0.0, 1.0, 1.0, 1.0]
    losses = [line["average_loss"] for line in lines]
    assert losses[2] < losses[0] and losses[3] < losses[0]


@needs_mpirun
def test_a_rank_that_fails_while_the_process_group_ends_ends_the_others(workspace):
    """HCCL waits there on rank 0 until all ranks have arrived, without a limit."""
    program = Path(__file__).parent.parent / "support" / "rank_programs" / "stuck_at_the_end.py"
    command = ranks.mpirun(2, sys.executable, program, *ranks.flags(2, "stuck", max_steps=1))
    with ranks.started(command, workspace) as job:
        done = job.finish(seconds=60)
    assert done.returncode == 1
    assert "rank 1: RuntimeError: the connection is lost" in done.stdout
    assert "rank 0: stopping, because rank 1 failed" in done.stdout
