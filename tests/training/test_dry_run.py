"""run_pretraining.py --dry_run: its figures are those of the run, it finds what would stop it, and writes nothing."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import h5py
import pytest

import run_pretraining
from common.cli import format_bytes
from common.errors import UserError
from data import dataloader
from data.shard_reader import ShardReader
from data.shards import find_shards
from devices.device import Device, proc_bytes
from parallel.rendezvous import RankInfo
from tests.support import ranks, samples
from training import arguments


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a config, training and held-out shards, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    return ranks.write_workspace(tmp_path)


def flags(**changes) -> list[str]:
    return ranks.flags(1, "out", **{"do_train": None, "dry_run": True, "skip_checkpoint": None, **changes})


def dry_run(**changes) -> dict:
    """The figures of a dry run in this process."""
    with ShardReader() as reader:
        return run_pretraining.pretrain(arguments.parse_arguments(flags(**changes)), RankInfo(), reader)


def contents(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_figures_of_a_run_add_up_and_nothing_is_written(workspace, capsys):
    before = contents(workspace)
    figures = dry_run(eval_dir="held_out", eval_freq=8, num_steps_per_checkpoint=10, tensorboard_logdir="board")
    assert contents(workspace) == before
    assert figures["steps"] == 30 and figures["steps_per_epoch"] == (37 + 50 + 29) / 16
    weights = 4 * samples.config().parameters
    assert figures["checkpoint_bytes"] == 3 * (1 + 2) * weights
    printed = capsys.readouterr().out
    assert "116 rows / 16 rows a step of all ranks = 7.2 steps; the 30 steps of this run are 4.14 epochs" in printed
    assert "8 accumulation steps × 2 rows × 1 sequences a row = 16 sequences" in printed
    assert f"{samples.config().parameters / 1e6:.1f} million parameters" in printed
    assert re.search(r"time: .* = 30 steps of \S+ s \+ 4 evaluations in", printed)
    assert figures["seconds"] > 30 * figures["seconds_per_step"] > 0.0


def test_a_dry_run_resumes_where_the_run_stopped(workspace):
    run_pretraining.main(flags(do_train=True, dry_run=None, steps_this_run=12))
    before = contents(workspace)
    assert dry_run(resume_from_checkpoint=True)["steps"] == 18
    assert contents(workspace) == before
    run_pretraining.main(flags(do_train=True, dry_run=None, resume_from_checkpoint=True, steps_this_run=13))
    assert dry_run(resume_from_checkpoint=True, steps_this_run=13)["steps"] == 0


def spoil_last_row() -> None:
    with h5py.File("data/sample_training_2.hdf5", "a") as file:
        file["input_ids"][28, 3] = 40_000


def test_a_bad_row_is_found_wherever_it_is(workspace, monkeypatch, capsys):
    monkeypatch.setattr(dataloader, "ROWS_CHECKED_FIRST", 1)
    spoil_last_row()
    with pytest.raises(UserError, match="sample_training_2.hdf5: input_ids of row 28 holds 40000"):
        dry_run()
    with pytest.raises(UserError, match="held_out"):
        shutil.move("data/sample_training_2.hdf5", "held_out/sample_test_1.hdf5")
        dry_run(eval_dir="held_out", skip_bad_shards=True)


@pytest.mark.parametrize("seed", [2, 5, 1])  # the shard's turn comes first, second or last
def test_a_bad_shard_is_named_where_the_run_would_skip_it_and_its_rows_do_not_count(workspace, capsys, seed):
    spoil_last_row()
    assert dry_run(skip_bad_shards=True, seed=seed)["steps_per_epoch"] == (37 + 50) / 16
    assert "would be skipped: " in capsys.readouterr().out


@pytest.mark.parametrize("changes, said", [
    ({"output_dir": "config.json/out"}, "--output_dir: .*/config.json is not a writable folder"),
    ({"json_summary": "config.json/log"}, "--json_summary: .*/config.json is not a writable folder"),
    ({"json_summary": "data"}, "--json_summary data: not a writable file"),
    ({"tensorboard_logdir": "config.json"}, "--tensorboard_logdir: .*/config.json is not a writable folder"),
    ({"input_dir": "nowhere"}, "--input_dir nowhere: no such folder"),
    ({"max_predictions_per_seq": 3}, "made with 4 predictions a sequence")])
def test_what_would_stop_the_run_is_reported_in_one_line(workspace, changes, said):
    before = contents(workspace)
    with pytest.raises(UserError, match=said) as refusal:
        dry_run(**changes)
    assert "\n" not in str(refusal.value)
    assert contents(workspace) == before


def test_a_disk_that_is_too_small_is_refused(workspace, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2e9, 2e9, 1e6))
    with pytest.raises(UserError, match=r"--output_dir out: its checkpoints take \S+ MB, but 1 MB are free"):
        dry_run()


def test_space_of_older_checkpoints_counts_as_free(workspace, monkeypatch, capsys):
    """A run of which three are kept writes a fourth, then removes the first."""
    run_pretraining.main(flags(do_train=True, dry_run=None, steps_this_run=4, num_steps_per_checkpoint=1))
    one = (workspace / "out" / "ckpt_4.pt").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 * one, 8 * one, 1.5 * one))
    figures = dry_run(resume_from_checkpoint=True, num_steps_per_checkpoint=1)
    assert figures["checkpoint_bytes"] == pytest.approx(4 * one, rel=0.05)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9 * one, 9 * one, 0.5 * one))
    with pytest.raises(UserError, match="taken by older ones"):
        dry_run(resume_from_checkpoint=True, num_steps_per_checkpoint=1)


def test_a_loss_in_chunks_gets_no_memory_estimate(workspace):
    figures = dry_run(mlm_loss_chunk=5, use_cpu_kernels="no")
    assert figures["estimated_memory"] is None and figures["seconds"] > 0.0


def test_memory_counts_all_processes_of_a_rank(workspace, capsys):
    figures = dry_run(eval_dir="held_out")
    reader = 25_000_000  # at least: Python with numpy and h5py
    assert figures["memory"] > proc_bytes("/proc/self/status", "VmHWM") + reader
    rows = format_bytes((2 * 50 + 11) * find_shards("data")[0].row_bytes)  # the largest shard twice, and the held out
    assert re.search(f"shards: up to {rows} of rows in the memory of a rank's process, and \\S+ MB in that of the "
                     "process that reads them", capsys.readouterr().out)


def test_memory_that_is_too_small_is_refused(workspace, monkeypatch):
    monkeypatch.setattr(Device, "free_memory", lambda self: 1_000_000)
    with pytest.raises(UserError, match=r"needs about \S+ [MG]B of memory, but \S+ [MG]B are available: raise --grad"):
        dry_run()


def finished(command) -> tuple[str, int]:
    """What a command prints, and the most memory in bytes that it and its child held at a time."""
    peak = 0
    with ranks.started(command, Path.cwd()) as job:
        while job.process.poll() is None:
            held = [proc_bytes_now(pid) for pid in (job.process.pid, *job.descendants())]
            peak = max(peak, sum(held))
            time.sleep(0.05)
        done = job.finish()
    assert done.returncode == 0, done.stdout
    return done.stdout, peak


def proc_bytes_now(pid: int) -> int:
    try:
        return proc_bytes(f"/proc/{pid}/status", "VmRSS") or 0
    except ProcessLookupError:
        return 0


LARGER = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024, "num_hidden_layers": 4,
          "max_position_embeddings": 128, "attention_probs_dropout_prob": 0.1}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks of memory are read from /proc")
@pytest.mark.parametrize("rows, size, length, packed, accumulation", [
    (300, {}, 24, True, 4), (300, LARGER, 128, False, 1), (60_000, {"max_position_embeddings": 128}, 128, False, 4)])
def test_memory_is_what_the_run_takes(workspace, rows, size, length, packed, accumulation):
    """Within 15 %, by the estimate and by the timed steps; two steps run beside the copy for a checkpoint."""
    samples.write_config(workspace / "config.json", **size)
    samples.write_dataset(workspace / "long", (rows, rows), sequence_length=length)
    if packed:
        subprocess.run([sys.executable, ranks.ROOT / "pack_pretraining_data_pytorch.py", "--input_dir=long",
                        "--output_dir=packed", f"--max_sequence_length={length}", "--max_predictions_per_sequence=4"],
                       check=True, capture_output=True)
    changes = {"input_dir": "packed" if packed else "long", "max_seq_length": length, "max_steps": 4,
               "gradient_accumulation_steps": accumulation, "num_steps_per_checkpoint": 2}
    printed, _ = finished([*ranks.TRAIN, *flags(**changes)])
    _, peak = finished([*ranks.TRAIN, *flags(**changes, do_train=True, dry_run=None)])
    figures = [float(number) * {"M": 1e6, "G": 1e9}[unit]
               for number, unit in re.findall(r"memory: (?:about )?(\S+) ([MG])B", printed)]
    assert len(figures) == 2 and figures == pytest.approx([peak, peak], rel=0.15)


@ranks.needs_mpirun
def test_many_ranks_make_a_dry_run_together(workspace):
    done = ranks.run(ranks.mpirun(2, *ranks.TRAIN, *ranks.flags(2, "out", do_train=None, dry_run=True)), workspace)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("116 rows / 16 rows a step of all ranks") == done.stdout.count("time: ") == 1
    assert "DDP" in done.stdout
    assert not (workspace / "out").exists() and not (workspace / "out.json").exists()
