"""Trainings that read their data from object storage and keep their checkpoints there."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

import evaluate
import pack_pretraining_data_pytorch
import plot_training
import run_pretraining
import upload_shards
from checkpoint import remote_folder
from checkpoint.folder import open_folder, read_complete, saved_steps
from common import object_locks, object_store
from common.errors import UserError
from common.object_locks import prefix_lock
from data.shard_cache import Fetching, fetch_shard
from data.shards import find_shards
from tests.support import ranks, samples, small_run, synthetic
from tests.support.object_store import bucket, objects, s3_server
from tests.support.shaped_link import shaped_link
from tests.support.small_run import files_of_at_most
from training.trainer import Trainer

ROWS = (37, 50, 29)
EPOCHS_AND_A_HALF = 22  # steps of 8 rows
FLAGS = {"train_batch_size": 8, "gradient_accumulation_steps": 4, "max_steps": EPOCHS_AND_A_HALF, "no_cuda": True,
         "num_steps_per_checkpoint": 10, "json_summary": "log.json"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with configs and sets, the same sets at s3://data/…, and the server that holds them."""
    folder = tmp_path_factory.mktemp("work")
    with s3_server() as url:
        small_run.write_workspace(folder)
        samples.write_dataset(folder / "data", ROWS)
        samples.write_dataset(folder / "dynamic", ROWS, write=synthetic.write_shard_without_masks)
        pack_pretraining_data_pytorch.main([
            "--input_dir", folder / "data", "--output_dir", folder / "packed", "--n_processes", 1,
            "--max_sequence_length", samples.SEQUENCE_LENGTH, "--max_predictions_per_sequence", samples.PREDICTIONS])
        for name in ("data", "dynamic", "packed", "held_out"):
            upload_shards.main(["--input_dir", folder / name, "--output_dir", f"s3://data/{name}"])
        yield folder, url


@pytest.fixture(autouse=True)
def here(workspace, tmp_path, monkeypatch):
    """An empty disk, but for the workspace's files."""
    monkeypatch.chdir(workspace[0])
    monkeypatch.setenv("BERT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(object_store, name, 0.05)
    monkeypatch.setattr(remote_folder, "POLL_SECONDS", 0.05)
    return tmp_path


def train(**changes):
    return run_pretraining.main(small_run.flags(**{**FLAGS, **changes}))


def test_a_run_in_object_storage_is_bit_for_bit_that_in_folders_also_resumed_on_an_empty_disk(workspace, here, capsys):
    train(input_dir="packed", eval_dir="held_out", output_dir=here / "out", json_summary=here / "local.json")
    remote = {"input_dir": "s3://data/packed", "eval_dir": "s3://data/held_out", "output_dir": "s3://data/run",
              "json_summary": "s3://data/run/log.json"}
    train(**remote, steps_this_run=12)
    assert "saved s3://data/run/ckpt_12.pt" in capsys.readouterr().out
    shutil.rmtree(here / "cache")
    train(**remote, resume_from_checkpoint=True)
    assert "from s3://data/run/ckpt_12.pt" in capsys.readouterr().out
    (here / "remote.json").write_bytes(objects("run/")["log.json"])
    local, remote = (small_run.logged_steps(here / name) for name in ("local.json", "remote.json"))
    assert len(local) == EPOCHS_AND_A_HALF and local == remote
    assert set(objects("run/")) == {"ckpt_12.pt", "ckpt_20.pt", "ckpt_22.pt", "log.json"}
    assert objects("run/")["ckpt_22.pt"] != b"" and saved_steps(open_folder("s3://data/run")) == [12, 20, 22]
    evaluate.main(["--checkpoint", "s3://data/run", "--eval_dir", "s3://data/held_out", "--no_cuda"])
    plot_training.main(["s3://data/run/log.json", "--report", here / "report.html"])
    assert "s3://data/run" in (here / "report.html").read_text(encoding="utf-8")


def test_a_checkpoint_that_was_not_resumed_from_is_set_aside_and_a_damaged_one_passed_over(workspace, here, capsys):
    train(output_dir="s3://data/aside", max_steps=20)
    train(output_dir="s3://data/aside", max_steps=20, resume_from_checkpoint=True, resume_step=10,
          steps_this_run=15)
    assert set(objects("aside/")) == {"ckpt_10.pt", "ckpt_15.pt", "ckpt_20.pt.set_aside"}
    content = bytearray(objects("aside/")["ckpt_15.pt"])
    content[len(content) // 2] ^= 1
    bucket().put_object(Key="aside/ckpt_15.pt", Body=bytes(content))
    train(output_dir="s3://data/aside", max_steps=20, resume_from_checkpoint=True, steps_this_run=11)
    assert "skipped a damaged checkpoint" in capsys.readouterr().err
    assert {"ckpt_10.pt", "ckpt_11.pt", "ckpt_15.pt.set_aside"} <= set(objects("aside/"))


def test_uploads_that_a_killed_run_left_are_ended_and_its_files_not_believed(workspace, here):
    client = boto3.client("s3")
    client.create_multipart_upload(Bucket="data", Key="left/ckpt_5.pt")
    client.create_multipart_upload(Bucket="data", Key="leftovers/ckpt_5.pt")
    folder = open_folder("s3://data/left")
    folder.scratch.mkdir(parents=True)
    (folder.scratch / "ckpt_99.pt").write_bytes(b"?")
    train(output_dir="s3://data/left", max_steps=1)
    uploads = client.list_multipart_uploads(Bucket="data").get("Uploads", [])
    assert [upload["Key"] for upload in uploads] == ["leftovers/ckpt_5.pt"]
    assert list(objects("left/")) == ["ckpt_1.pt"]


def test_a_store_that_is_away_stops_no_training(workspace, here, monkeypatch, capsys):
    """The server is there at the start, away while all checkpoints are written, and back before the end."""
    monkeypatch.setattr(object_store.S3Folder.__init__, "__defaults__", (1,))  # no attempts but our own
    with shaped_link(workspace[1]) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.url)
        original = Trainer.train_step

        def step(self, number):
            (link.cut if 2 <= number <= 18 else link.away.clear)()
            return original(self, number)

        monkeypatch.setattr(Trainer, "train_step", step)
        train(output_dir="s3://data/away", max_steps=20, num_steps_per_checkpoint=3)
        monkeypatch.setenv("AWS_ENDPOINT_URL", workspace[1])
    printed = capsys.readouterr()
    assert "trying again" in printed.out and "saved s3://data/away/ckpt_20.pt" in printed.out
    assert "ckpt_20.pt" in objects("away/")


def test_the_end_of_a_run_says_where_a_checkpoint_is_that_could_not_be_uploaded(workspace, here, monkeypatch):
    monkeypatch.setattr(remote_folder, "LAST_PATIENCE", 0.5)
    monkeypatch.setattr(object_store.S3Folder.__init__, "__defaults__", (1,))
    with shaped_link(workspace[1]) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.url)
        original = Trainer.train_step
        monkeypatch.setattr(Trainer, "train_step", lambda self, number: (link.cut(), original(self, number))[1])
        with pytest.raises(UserError, match="ckpt_1.pt, the last of this run, could not be uploaded: .*in ") as end:
            train(output_dir="s3://data/lost", max_steps=1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", workspace[1])
    assert Path(str(end.value).rpartition(" ")[2]).stat().st_size > 0
    assert "ckpt_1.pt" not in objects("lost/")


def test_a_full_scratch_disk_is_one_line(workspace, here):
    full = "{}: File too large: --shard_cache_gb bounds what shards take here, BERT_CACHE_DIR names another folder"
    with files_of_at_most(1024), pytest.raises(UserError, match=full.format("shard_index.json")):
        train(input_dir="s3://data/data", output_dir="s3://data/full")
    shard = find_shards("s3://data/data")[0]
    with files_of_at_most(4096), pytest.raises(UserError, match=full.format(f"{shard.path.name}.part")):
        fetch_shard(shard.remote, shard.path, Fetching())
    with files_of_at_most(1 << 20), pytest.raises(UserError, match="ckpt_1.pt, the last of this run, could not be "
                                                  "written: .*the newest is none"):
        train(output_dir="s3://data/full", max_steps=1)
    train(output_dir="s3://data/full", max_steps=1)
    shutil.rmtree(here / "cache")
    with files_of_at_most(1 << 20), pytest.raises(UserError, match=full.format("ckpt_1.pt")):
        read_complete(open_folder("s3://data/full"), 1)


def test_a_second_run_below_the_same_prefix_is_refused_and_a_dead_ones_lock_taken_over(workspace, here, monkeypatch):
    monkeypatch.setattr(object_locks, "RENEWAL_SECONDS", 0.1)
    with prefix_lock("s3://data/held", "--output_dir s3://data/held"):
        time.sleep(0.3)  # it renews its lock
        code = "import sys, run_pretraining; from common import cli; cli.run(run_pretraining.main)"
        done = subprocess.run([sys.executable, "-c", code, *small_run.flags(output_dir="s3://data/held")],
                              cwd=workspace[0], env=ranks.environment(), capture_output=True, text=True)
        assert done.returncode == 2 and "in use by" in done.stderr and "Traceback" not in done.stderr
        assert list(objects("held/")) == [".in_use"]
    assert not objects("held/")
    program = ("import os; from common.object_locks import prefix_lock\n"
               "with prefix_lock('s3://data/held', 'x'): os._exit(1)")
    subprocess.run([sys.executable, "-c", program], env=ranks.environment())
    assert objects("held/")
    with prefix_lock("s3://data/held", "--output_dir s3://data/held"):
        assert json.loads(objects("held/")[".in_use"].splitlines()[0])["pid"]


def test_a_store_without_conditional_writes_has_locks_too(workspace, here, monkeypatch):
    put = object_store.S3Folder.put

    def put_without_conditions(self, name, content, **conditions):
        if conditions:
            raise UserError(f"{name}: An error occurred (NotImplemented)")
        return put(self, name, content)

    monkeypatch.setattr(object_store.S3Folder, "put", put_without_conditions)
    monkeypatch.setattr(object_locks, "SETTLE_SECONDS", 0.05)
    with prefix_lock("s3://data/simple", "--output_dir s3://data/simple"):
        held = objects("simple/")[".in_use"]
        other = object_locks.ObjectLock("s3://data/simple", ".in_use", "")
        assert not other.create() and objects("simple/")[".in_use"] == held
    assert not objects("simple/")


def test_a_bucket_that_is_not_there_is_one_line(workspace, here):
    with pytest.raises(UserError, match="--output_dir s3://nobucket/run: cannot be written: .*no such bucket"):
        train(output_dir="s3://nobucket/run")
    with pytest.raises(UserError, match="no such bucket"):
        train(input_dir="s3://nobucket/data")


@pytest.mark.slow
@ranks.needs_mpirun
def test_two_ranks_without_a_shared_folder_train_to_the_losses_of_folders(workspace, here):
    """Each rank has a disk of its own, and uploads its own share of the optimizer's state; the run is stopped in the
    middle, and goes on from empty disks.  Rows without masks.
    """
    folder, _ = workspace
    changes = {"max_steps": EPOCHS_AND_A_HALF, "skip_checkpoint": None, "num_steps_per_checkpoint": 12,
               "use_zero_optimizer": "True", "allreduce_post_accumulation": True}
    own_disk = [sys.executable, "-c", "import os, sys; os.environ['BERT_CACHE_DIR'] += os.environ.get("
                "'OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK', '0')); os.execv(sys.argv[1], sys.argv[1:])"]

    def run(disk: str, **more) -> None:
        command = ranks.mpirun(2, *own_disk, *ranks.TRAIN, *ranks.flags(2, "two", **{**changes, **more}))
        done = ranks.run(command, folder, BERT_CACHE_DIR=str(here / disk))
        assert done.returncode == 0, done.stdout

    run("none", input_dir="dynamic", output_dir=str(here / "out"), json_summary="two_local.json")
    remote = {"input_dir": "s3://data/dynamic", "output_dir": "s3://data/two", "json_summary": "two_s3.json"}
    run("first", **remote, steps_this_run=12)
    run("second", **remote, resume_from_checkpoint=True)
    local, stored = (ranks.figures(folder / f"two_{name}.json", "step_mean_loss") for name in ("local", "s3"))
    assert local == stored and len(local) == EPOCHS_AND_A_HALF
    assert {name for name in objects("two/") if name.startswith("ckpt_22.")} == {
        "ckpt_22.pt", *(f"ckpt_22.optim/{name}" for name in ("index.json", "rank_0_of_2.pt", "rank_1_of_2.pt"))}
