"""--normalize_loss: what a masked token weighs where the micro-batches of a step hold different numbers of them."""

from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
import torch

from common.bert_config import BertConfig
from data.dataloader import average_sequences_per_row
from data.shard_reader import ShardReader
from data.shards import find_shards
from devices.device import Device
from modeling import BertForPreTraining
from optim.build import OptimizerOptions, build_optimizer
from optim.lr_schedule import learning_rate
from pack_pretraining_data_pytorch import main as pack
from parallel.ranks import SingleRank
from parallel.rendezvous import RankInfo
from tests.support import ranks, samples, small_run, synthetic
from tests.support.samples import batch_stream
from training.loss_weights import TokenMean

STEPS = 3
ROUNDING = 2e-5  # of the losses, in fp32


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Rows with 1 and with 4 masked tokens, unpacked and packed to up to 3 sequences a row, and no dropout."""
    folder = tmp_path_factory.mktemp("uneven")
    samples.write_config(folder / "config.json", attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0)
    synthetic.write_unpacked_shard(folder / "unpacked" / "uneven_training_0.hdf5", [5] * 20 + [24] * 13, 3, 24, 4)
    pack([f"--input_dir={folder / 'unpacked'}", f"--output_dir={folder / 'packed'}", "--max_sequence_length=24",
          "--max_predictions_per_sequence=4", "--n_processes=1", "--disable_progress_bar"])
    return folder


@pytest.fixture
def inside(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    return workspace


def flags(form: str, rows: int, micro_batches: int, **changes) -> dict:
    """The flags of a run of so many rows a step, in so many micro-batches; on packed data as many as asked for."""
    with ShardReader() as reader:
        per_row = average_sequences_per_row(find_shards(form), reader)
    asked = round(micro_batches * per_row)
    return {"input_dir": form, "train_batch_size": rows // micro_batches * asked, "gradient_accumulation_steps": asked,
            "max_steps": STEPS, "num_steps_per_checkpoint": STEPS, **changes}


def trained(output: str, steps: int = STEPS, **changes) -> tuple[dict, dict]:
    """The losses by figure and step, and the weights in the end, of a run in this process."""
    small_run.train(output_dir=output, json_summary=f"{output}/log.json", **changes)
    return results(output, steps)


def results(output: str, steps: int) -> tuple[dict, dict]:
    names = ("average_loss", "average_mlm_loss", "average_nsp_loss")
    losses = {(name, step): value for name in names
              for step, value in ranks.figures(Path(output, "log.json"), name).items()}
    assert len(losses) == 3 * steps
    return losses, torch.load(f"{output}/ckpt_{steps}.pt", weights_only=True)["model"]


def assert_equal_to_rounding(one, other) -> None:
    assert one[0] == pytest.approx(other[0], abs=ROUNDING)
    for name, weight in one[1].items():
        torch.testing.assert_close(other[1][name], weight, atol=2e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def in_one_micro_batch(workspace):
    """A function that gives what a run by tokens with one micro-batch of 8 rows a step does."""
    @cache
    def expected(form: str) -> tuple[dict, dict]:
        return trained(f"{form}_one", **flags(form, 8, 1, normalize_loss="tokens"))

    return expected


@pytest.mark.parametrize("form", ["unpacked", "packed"])
def test_by_tokens_one_micro_batch_equals_many(inside, in_one_micro_batch, form):
    one, eight = in_one_micro_batch(form), trained(f"{form}_8", **flags(form, 8, 8, normalize_loss="tokens"))
    assert_equal_to_rounding(one, eight)
    losses, _ = trained(f"{form}_default", **flags(form, 8, 8, steps_this_run=1), steps=1)
    assert abs(losses["average_mlm_loss", 1] - one[0]["average_mlm_loss", 1]) > 20 * ROUNDING


@pytest.mark.parametrize("form, mode", [
    ("unpacked", {}), ("packed", {"allreduce_post_accumulation": True, "use_zero_optimizer": "True"})])
def test_by_tokens_two_ranks_equal_one(inside, in_one_micro_batch, form, mode):
    output = f"{form}_on_two"
    command = small_run.flags(output_dir=output, json_summary=f"{output}/log.json", **mode,
                              **flags(form, 4, 2, normalize_loss="tokens"))
    launcher = ranks.mpirun if ranks.MPIRUN else ranks.torchrun
    done = ranks.run(launcher(2, *ranks.TRAIN, *command), inside)
    assert done.returncode == 0, done.stdout
    assert_equal_to_rounding(in_one_micro_batch(form), results(output, STEPS))


def test_by_default_the_loss_is_the_mean_of_the_micro_batches_means(inside):
    """Bit for bit, as a loop that knows no other."""
    losses, weights = trained("plain", use_cpu_kernels="no", attention="plain", **flags("unpacked", 8, 4))
    torch.manual_seed(42)
    model = BertForPreTraining(BertConfig.from_json_file("config.json"), "plain")
    optimizer, _ = build_optimizer(model, Device(), OptimizerOptions(learning_rate=0.01))
    with ShardReader() as reader, closing(batch_stream(find_shards("unpacked"), 2, 42, reader=reader)) as stream:
        for step in range(1, STEPS + 1):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, 0.01, 0.3, STEPS)
            total = torch.zeros(())
            for _ in range(4):
                loss = model(next(stream))["loss"]
                (loss / 4).backward()
                total += loss.detach()
            optimizer.step()
            optimizer.zero_grad()
            assert losses["average_loss", step] == (total / 4).item()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("changes", [{"hmp": True}, {"use_cpu_kernels": "no", "mlm_loss_chunk": 5},
                                     {"use_cpu_kernels": "no", "checkpoint_activations": True}])
def test_by_tokens_the_losses_are_the_same_however_they_are_computed(inside, in_one_micro_batch, changes):
    losses, _ = trained("_".join(changes), **flags("packed", 8, 4, normalize_loss="tokens"), **changes)
    assert losses == pytest.approx(in_one_micro_batch("packed")[0], rel=5e-3 if "hmp" in changes else 1e-5)


def test_a_step_without_a_masked_token_changes_nothing_by_its_mlm_loss():
    weights = TokenMean(2, SingleRank(RankInfo()), Device())
    batch = {"masked_lm_positions": torch.zeros(3, 4), "next_sentence_weights": torch.ones(3, 1)}
    outputs = {"mlm_loss": torch.tensor(0.0), "nsp_loss": torch.tensor(0.5)}
    for _ in range(2):
        weights.count(batch)
    weights.start_step()
    assert {name: value.item() for name, value in weights.weighted(outputs).items()} == {
        "loss": 0.5, "mlm_loss": 0.0, "nsp_loss": 0.5}


def test_by_tokens_a_resumed_run_has_the_bits_of_one_that_never_stopped(inside):
    whole = trained("whole", **flags("packed", 8, 4, normalize_loss="tokens"))
    command = flags("packed", 8, 4, normalize_loss="tokens", output_dir="stopped", json_summary="stopped/log.json")
    for stop in (1, STEPS):
        small_run.train(**command, steps_this_run=stop, resume_from_checkpoint=True)
    again = results("stopped", STEPS)
    assert again[0] == whole[0]
    assert all(torch.equal(again[1][name], weight) for name, weight in whole[1].items())
