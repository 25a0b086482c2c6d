"""A run that stopped continues as if it had not: the same losses, weights and moments, bit for bit."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pack_pretraining_data_pytorch as packer
import run_pretraining
from checkpoint.folder import checkpoint_path, read_checkpoint, saved_steps
from data.shard_reader import ShardReader
from data.shards import find_shards, read_rows
from tests.support import ranks, samples
from tests.support.small_run import logged_steps, train

LENGTHS = {1: 24, 2: 32}  # tokens, by phase
STEPS = {1: 6, 2: 5}  # of 8 rows; an epoch has 25 in shards of 7, 13 and 5, and packed about 13


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A config, and shards of both phases in both forms."""
    folder = tmp_path_factory.mktemp("data")
    samples.write_config(folder / "config.json")
    for phase, length in LENGTHS.items():
        samples.write_dataset(folder / f"unpacked_{phase}", seed=phase, sequence_length=length)
        packer.main([f"--input_dir={folder / f'unpacked_{phase}'}", f"--output_dir={folder / f'packed_{phase}'}",
                     f"--max_sequence_length={length}", f"--max_predictions_per_sequence={samples.PREDICTIONS}"])
    return folder


def train_phase(data, output, form: str, phase: int, **changes) -> None:
    """One run of a phase, from wherever the folder `output` is to the end or to steps_this_run."""
    train(config_file=data / "config.json", input_dir=data / f"{form}_{phase}", output_dir=output,
          json_summary=output / f"log_{phase}.json", max_seq_length=LENGTHS[phase], max_steps=STEPS[phase],
          phase1_end_step=STEPS[1], phase2=phase == 2, resume_from_checkpoint=True, **changes)


def assert_same(path, other) -> None:
    """Two checkpoints hold the same weights, moments and counts."""
    one, two = read_checkpoint(path), read_checkpoint(other)
    assert {key: one[key] for key in ("step", "phase", "skipped", "data")} == \
           {key: two[key] for key in ("step", "phase", "skipped", "data")}
    assert one["optimizer"]["param_groups"] == two["optimizer"]["param_groups"]
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name]), name
    for number, moments in one["optimizer"]["state"].items():
        assert all(torch.equal(moments[key], two["optimizer"]["state"][number][key]) for key in moments), number


def newest_three(phase: int, step: int) -> list[int]:
    """The checkpoints to be there where each step wrote one: in phase 2 the last of phase 1 besides."""
    if phase == 1:
        return list(range(1, step + 1))[-3:]
    others = [number for number in range(1, STEPS[1] + step + 1) if number != STEPS[1]]
    return sorted([STEPS[1], *others[-3:]])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["unpacked", "packed"])
def test_stopping_after_every_step_of_both_phases_changes_no_bit(data, tmp_path, form):
    """Every step is a point of an epoch and of a shard of its own; phase 1's last checkpoint outlives phase 2."""
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    for phase, steps in STEPS.items():
        train_phase(data, whole, form, phase)
        for step in range(1, steps + 1):
            train_phase(data, pieces, form, phase, steps_this_run=step)
            assert saved_steps(pieces) == newest_three(phase, step)
        assert logged_steps(pieces / f"log_{phase}.json") == logged_steps(whole / f"log_{phase}.json")
        assert set(logged_steps(pieces / f"log_{phase}.json")) == set(range(1, steps + 1))
    assert_same(checkpoint_path(whole, sum(STEPS.values())), checkpoint_path(pieces, sum(STEPS.values())))


def test_going_on_from_an_older_checkpoint_repeats_the_steps_behind_it(data, tmp_path):
    """The newer ones are set aside, so that no later run mixes the two."""
    output = tmp_path / "out"
    train_phase(data, output, "unpacked", 1, num_steps_per_checkpoint=2)
    last = (output / "ckpt_6.pt").read_bytes()
    train_phase(data, output, "unpacked", 1, resume_step=2, steps_this_run=3)
    assert saved_steps(output) == [2, 3]
    assert (output / "ckpt_6.pt.set_aside").read_bytes() == last
    train_phase(data, output, "unpacked", 1)
    assert (output / "ckpt_6.pt").read_bytes() == last


# --- several ranks ---

@pytest.mark.slow
@pytest.mark.parametrize("dropout, mode", [
    (0.1, {}),
    (0.0, {"allreduce_post_accumulation": True, "use_zero_optimizer": "True"}),
], ids=["ddp", "sharded"])
def test_two_ranks_go_on_bit_for_bit_and_one_rank_with_the_same_rows(tmp_path, monkeypatch, dropout, mode):
    """A run of 2 ranks, steps 6 to 9 of it again from ckpt_5, and once more on one rank, with 16 rows a step."""
    monkeypatch.chdir(ranks.write_workspace(tmp_path))
    samples.write_config(tmp_path / "config.json", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    flags = {"max_steps": 9, "num_steps_per_checkpoint": 5, "skip_checkpoint": None, **mode}
    launcher, weights = ranks.mpirun if ranks.MPIRUN else ranks.torchrun, []
    for more in ({}, {"json_summary": "again.json", "resume_from_checkpoint": True, "resume_step": 5}):
        done = ranks.run(launcher(2, *ranks.TRAIN, *ranks.flags(2, "out", **flags, **more)), tmp_path)
        assert done.returncode == 0, done.stdout
        weights.append(read_checkpoint("out/ckpt_9.pt")["model"])
    whole, again = logged_steps(tmp_path / "out.json"), logged_steps(tmp_path / "again.json")
    assert again == {step: whole[step] for step in (6, 7, 8, 9)}
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    run_pretraining.main(ranks.flags(1, "out", **flags, **more | {"json_summary": "alone.json"}))
    assert read_checkpoint("out/ckpt_9.pt")["data"]["rows"] == 9 * ranks.GLOBAL_BATCH
    if not dropout:
        expected, found = (ranks.figures(tmp_path / name, "step_mean_loss") for name in ("again.json", "alone.json"))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return find_shards(samples.write_dataset(tmp_path_factory.mktemp("rows")))


@pytest.fixture(scope="module")
def reader():
    with ShardReader() as reader:
        yield reader


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=4))
def test_no_row_is_lost_or_repeated_where_the_number_of_ranks_changes(found, reader, runs):
    """Runs one after the other, each (ranks, rows of a micro-batch, rounds): together a beginning of the sequence."""
    used, row = [], 0
    for world_size, size, rounds in runs:
        streams = [samples.batch_stream(found, size, 3, rank, world_size, reader=reader) for rank in range(world_size)]
        for stream in streams:
            stream.load_state_dict({"rows": row}, "the run before")
        for _ in range(rounds):
            used += [tuple(ids) for stream in streams for ids in next(stream)["input_ids"].tolist()]
        row += rounds * world_size * size
        for stream in streams:
            stream.close()
    stored = [tuple(ids) for shard in found for ids in read_rows(shard)["input_ids"].tolist()]
    for epoch in range(0, len(used), len(stored)):
        counts = Counter(used[epoch:epoch + len(stored)])
        assert counts <= Counter(stored) and (counts == Counter(stored) or epoch + len(stored) > len(used))
