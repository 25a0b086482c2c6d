"""The packing command on real shards: what comes out, and what is refused."""

import json
from collections import Counter

import h5py
import numpy as np
import pytest

import cli
import shards
from pack_pretraining_data_pytorch import main
from synthetic import write_unpacked_shard


def pack(input_dir, output_dir, *flags, length=128, predictions=20, depth=3):
    main(["--input_dir", str(input_dir), "--output_dir", str(output_dir), "--max_sequence_length", str(length),
          "--max_predictions_per_sequence", str(predictions), "--max_sequences_per_pack", str(depth),
          "--n_processes", "1", "--disable_progress_bar", *flags])


def unpacked_sequences(folder):
    """Each sequence of a folder of unpacked shards as plain numbers, counted."""
    sequences = Counter()
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            rows = {key: file[key][...].tolist() for key in file}
        for ids, mask, segments, positions, labels, label in zip(
                rows["input_ids"], rows["input_mask"], rows["segment_ids"], rows["masked_lm_positions"],
                rows["masked_lm_ids"], rows["next_sentence_labels"], strict=True):
            n = sum(mask)
            masked = [(p, t) for p, t in zip(positions, labels, strict=True) if p]
            sequences[tuple(ids[:n]), tuple(segments[:n]), tuple(masked), label] += 1
    return sequences


def packed_sequences(folder):
    """Each sequence of a folder of packed shards, cut out of its row one by one."""
    sequences = Counter()
    for path in sorted(folder.glob("*.hdf5")):
        with h5py.File(path) as file:
            rows = {key: file[key][...] for key in file}
        for row in range(len(rows["input_ids"])):
            r = {key: values[row] for key, values in rows.items()}
            for number in range(1, r["input_mask"].max() + 1):
                where = np.flatnonzero(r["input_mask"] == number)
                start, end = where[0], where[-1] + 1
                assert len(where) == end - start and list(r["positions"][where]) == list(range(end - start))
                assert r["next_sentence_positions"][number - 1] == start and r["next_sentence_weights"][number - 1] == 1
                masked = [(p - start, t) for p, t in zip(r["masked_lm_positions"].tolist(),
                                                         r["masked_lm_ids"].tolist(), strict=True)
                          if start < p < end]
                sequences[tuple(r["input_ids"][where].tolist()), tuple(r["segment_ids"][where].tolist()),
                          tuple(masked), int(r["next_sentence_labels"][number - 1])] += 1
    return sequences


@pytest.fixture
def unpacked(tmp_path):
    folder = tmp_path / "unpacked"
    rng = np.random.default_rng(5)
    for number, rows in enumerate((70, 1, 33)):
        write_unpacked_shard(folder / f"tiny_training_{number}.hdf5", rng.integers(5, 129, rows), seed=number)
    return folder


@pytest.mark.parametrize("depth", [1, 2, 3, 8, 40])
def test_packing_keeps_every_sequence_at_any_depth(unpacked, tmp_path, depth):
    pack(unpacked, tmp_path / "packed", depth=depth)
    assert packed_sequences(tmp_path / "packed") == unpacked_sequences(unpacked)


def test_packed_shard_has_the_schema_of_the_contract(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed", depth=5)
    metadata = json.loads((tmp_path / "packed_metadata.json").read_text())
    with h5py.File(tmp_path / "packed" / "mixed_strategies_part_0.hdf5") as file:
        found = {key: (file[key].dtype.str[1:], file[key].shape) for key in file}
    n = metadata["new_number_of_samples"]
    assert found == {
        "input_ids": ("i4", (n, 128)), "input_mask": ("i4", (n, 128)), "segment_ids": ("i1", (n, 128)),
        "positions": ("i4", (n, 128)), "masked_lm_positions": ("i4", (n, 25)), "masked_lm_ids": ("i4", (n, 25)),
        "next_sentence_positions": ("i4", (n, 5)), "next_sentence_labels": ("i1", (n, 5)),
        "next_sentence_weights": ("i4", (n, 5))}
    assert shards.find(tmp_path / "packed")[0].max_sequences == 5


def test_second_run_does_not_mix_with_the_first(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed")
    before = {path: path.read_bytes() for path in (tmp_path / "packed").iterdir()}
    with pytest.raises(cli.UserError, match="in use already.*--overwrite"):
        pack(unpacked, tmp_path / "packed", depth=2)
    assert {path: path.read_bytes() for path in (tmp_path / "packed").iterdir()} == before
    pack(unpacked, tmp_path / "packed", "--overwrite", depth=2)
    assert shards.find(tmp_path / "packed")[0].max_sequences == 2
