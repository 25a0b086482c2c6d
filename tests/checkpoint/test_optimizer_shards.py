"""ZeRO: each rank keeps its share of the optimizer's state, and its checkpoints load on any number of ranks."""

import json
import shutil

import h5py
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from common.bert_config import BertConfig
from lamb import NVLAMB
from modeling import BertForPreTraining
from optim.build import parameter_groups
from optim.zero import ShardedOptimizer, parameters
from tests.support import ranks
from tests.support.ranks import ROOT, TRAIN, flags, mpirun, needs_mpirun

SAVED_AT, STEPS = 10, 16
ZERO = {"allreduce_post_accumulation": True, "use_zero_optimizer": "True", "max_steps": STEPS}


def share_of_rank(model, rank: int, world_size: int) -> ShardedOptimizer:
    """The optimizer of one of several ranks, whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        return ShardedOptimizer(parameter_groups(model), NVLAMB)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_state_of_bert_large_is_one_nth_on_each_rank(world_size):
    with torch.device("meta"):
        model = BertForPreTraining(BertConfig.from_json_file(ROOT / "bert_config.json"))
    shares = [parameters(share_of_rank(model, rank, world_size).optim) for rank in range(world_size)]
    assert len({id(weight) for share in shares for weight in share}) == sum(map(len, shares))
    total = sum(weight.numel() for weight in model.parameters())
    sizes = [sum(weight.numel() for weight in share) for share in shares]
    assert sum(sizes) == total
    assert sizes == pytest.approx([total / world_size] * world_size, rel=0.03)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with config and data, and what one rank made of them: one.json."""
    folder = ranks.write_workspace(tmp_path_factory.mktemp("sharded"))
    assert ranks.run([*TRAIN, *flags(1, "one", max_steps=STEPS)], folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def of_four_ranks(workspace):
    """The folder of a run that four ranks ended after SAVED_AT steps."""
    done = ranks.run(mpirun(4, *TRAIN, *flags(4, "four", skip_checkpoint=None, steps_this_run=SAVED_AT,
                                              num_steps_per_checkpoint=SAVED_AT - 2, **ZERO)), workspace)
    assert done.returncode == 0, done.stdout
    return workspace / "four"


@needs_mpirun
def test_each_rank_writes_its_own_share_and_the_model_is_in_the_plain_file(of_four_ranks):
    folder = of_four_ranks / f"ckpt_{SAVED_AT}.optim"
    files = json.loads((folder / "index.json").read_text())["files"]
    assert sorted(files) == [f"rank_{rank}_of_4.pt" for rank in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == ["index.json", *sorted(files)]
    model = BertForPreTraining(BertConfig.from_json_file(of_four_ranks.parent / "config.json"))
    numbers = sorted(number for facts in files.values() for number in facts["parameters"])
    assert numbers == list(range(len(list(model.parameters()))))
    state = torch.load(of_four_ranks / f"ckpt_{SAVED_AT}.pt", weights_only=True)
    assert set(state["model"]) == set(model.state_dict())
    assert "state" not in state["optimizer"]


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("count, changes", [(2, ZERO), (1, ZERO), (2, {**ZERO, "use_zero_optimizer": "False"})])
def test_a_checkpoint_of_four_ranks_resumes_on_fewer(workspace, of_four_ranks, count, changes):
    output = f"resumed_on_{count}_{changes['use_zero_optimizer']}"
    shutil.copytree(of_four_ranks, workspace / output)
    command = [*TRAIN, *flags(count, output, resume_from_checkpoint=True, **changes)]
    done = ranks.run(mpirun(count, *command) if count > 1 else command, workspace)
    assert done.returncode == 0, done.stdout
    one = ranks.figures(workspace / "one.json", "step_mean_loss")
    expected = {step: one[step] for step in range(SAVED_AT + 1, STEPS + 1)}
    assert ranks.figures(workspace / f"{output}.json", "step_mean_loss") == pytest.approx(expected, abs=1e-4)


def cut_short(content: bytes) -> bytes:
    return content[:-100]


def with_another_byte(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


@needs_mpirun
@pytest.mark.slow
@pytest.mark.parametrize("damage", [cut_short, with_another_byte])
def test_a_checkpoint_whose_share_is_damaged_is_passed_over(workspace, of_four_ranks, damage):
    output = workspace / damage.__name__
    shutil.copytree(of_four_ranks, output)
    share = output / f"ckpt_{SAVED_AT}.optim" / "rank_2_of_4.pt"
    share.write_bytes(damage(share.read_bytes()))
    done = ranks.run(mpirun(2, *TRAIN, *flags(2, output.name, resume_from_checkpoint=True, **ZERO)), workspace)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("skipped a damaged checkpoint") == 1 and "rank_2_of_4.pt: " in done.stdout
    assert min(ranks.figures(workspace / f"{output.name}.json", "step_mean_loss")) == SAVED_AT - 1


@needs_mpirun
@pytest.mark.slow
def test_ranks_leave_out_a_bad_shard_together(workspace):
    """As one rank does: the same rows are used after it, so the losses are the same."""
    shutil.copytree(workspace / "data", workspace / "bad_data")
    with h5py.File(workspace / "bad_data" / "sample_training_1.hdf5", "r+") as file:
        file["input_ids"][3, 5] = 99999
    bad = {"input_dir": "bad_data", "skip_bad_shards": True, "max_steps": STEPS}
    for count in (1, 3):
        command = [*TRAIN, *flags(1, f"bad_{count}", **bad, train_batch_size=12 // count,
                                  gradient_accumulation_steps=6 // count)]
        done = ranks.run(mpirun(count, *command) if count > 1 else command, workspace)
        assert done.returncode == 0, done.stdout
        assert done.stdout.count("skipped from row") == 1 and "sample_training_1.hdf5" in done.stdout
    alone = ranks.figures(workspace / "bad_1.json", "step_mean_loss")
    assert len(alone) == STEPS
    assert ranks.figures(workspace / "bad_3.json", "step_mean_loss") == pytest.approx(alone, abs=1e-4)
