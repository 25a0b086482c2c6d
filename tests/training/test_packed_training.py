"""What the packer writes trains as the unpacked set does, at any depth."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from data.dataloader import average_sequences_per_row, batches_once, sequences_in
from data.shard_reader import ShardReader
from data.shards import find_shards
from modeling import BertForPreTraining
from pack_pretraining_data_pytorch import main as pack
from tests.support import samples
from tests.support.synthetic import VOCAB_SIZE, write_unpacked_shard

LENGTH, PREDICTIONS = 60, 9


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    rng = np.random.default_rng(1)
    for number, rows in enumerate((23, 30)):
        lengths = np.minimum(rng.geometric(0.09, rows) + 4, LENGTH)  # mostly short, so that eight meet in a row
        write_unpacked_shard(folder / f"a_training_{number}.hdf5", lengths, number, LENGTH, PREDICTIONS)
    return folder


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)
    return BertForPreTraining(samples.config(max_position_embeddings=LENGTH, initializer_range=0.1)).eval()


def whole_set(folder):
    """All rows of a folder in one batch."""
    found = find_shards(folder)
    (batch,) = batches_once(found, sum(shard.rows for shard in found), VOCAB_SIZE)
    return batch


def losses_and_gradients(model, batch):
    model.zero_grad()
    losses = model(batch)
    losses["loss"].backward()
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_packed_set_has_the_losses_and_gradients_of_the_unpacked_set(unpacked, model, tmp_path, depth):
    pack(["--input_dir", str(unpacked), "--output_dir", str(tmp_path / "packed"), "--max_sequence_length", str(LENGTH),
          "--max_predictions_per_sequence", str(PREDICTIONS), "--max_sequences_per_pack", str(depth),
          "--packing_method", "lpfhp", "--n_processes", "1", "--disable_progress_bar"])
    batch, packed = whole_set(unpacked), whole_set(tmp_path / "packed")
    assert packed["next_sentence_weights"].sum(axis=1).max() == depth
    assert sequences_in(packed) == sequences_in(batch) == 53
    assert len(packed["input_ids"]) <= 53 / min(depth, 2)
    losses, gradients = losses_and_gradients(model, batch)
    packed_losses, packed_gradients = losses_and_gradients(model, packed)
    for name, loss in losses.items():
        assert_close(packed_losses[name], loss, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-5)
    assert min(gradient.norm() for name, gradient in gradients.items() if name.endswith("weight")) > 1e-3


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_metadata_and_shards_agree_on_the_sequences_a_row(unpacked, tmp_path, depth):
    pack(["--input_dir", str(unpacked), "--output_dir", str(tmp_path / "packed"), "--max_sequence_length", str(LENGTH),
          "--max_predictions_per_sequence", str(PREDICTIONS), "--max_sequences_per_pack", str(depth),
          "--n_processes", "1", "--disable_progress_bar"])
    found = find_shards(tmp_path / "packed")
    with ShardReader() as reader:
        named = average_sequences_per_row(found, reader)
        (tmp_path / "packed_metadata.json").unlink()
        assert average_sequences_per_row(found, reader) == pytest.approx(named)
