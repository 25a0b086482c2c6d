"""The packing command on real shards: what comes out, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.packing import blocks, scatter_gather
from data.packing.methods import METHODS
from data.packing.recipe import reference_index
from data.shards import find_shards, read_rows
from data.workers import open_pool, ordered_map
from pack_pretraining_data_pytorch import main
from tests.support.synthetic import write_unpacked_shard

SCRIPT = Path(__file__).parent.parent.parent.parent / "pack_pretraining_data_pytorch.py"


def flags(input_dir, output_dir, *more, length=128, predictions=20, depth=3):
    return ["--input_dir", str(input_dir), "--output_dir", str(output_dir), "--max_sequence_length", str(length),
            "--max_predictions_per_sequence", str(predictions), "--max_sequences_per_pack", str(depth),
            "--disable_progress_bar", *more]


def pack(*arguments, **options):
    main([*flags(*arguments, **options), "--n_processes", "1"])


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


def contents(folder):
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def unpacked(tmp_path):
    folder = tmp_path / "unpacked"
    rng = np.random.default_rng(5)
    for number, rows in enumerate((70, 1, 33)):
        write_unpacked_shard(folder / f"tiny_training_{number}.hdf5", rng.integers(5, 129, rows), seed=number)
    return folder


@pytest.fixture
def small_pieces(monkeypatch):
    """Blocks of 9 rows and parts of 7."""
    monkeypatch.setattr(blocks, "TOKENS_PER_BLOCK", 9 * 128)
    monkeypatch.setattr(scatter_gather, "TOKENS_PER_PART", 7 * 128)


# --- what comes out ---

@pytest.mark.parametrize("depth", [1, 2, 3, 8, 40])
@pytest.mark.usefixtures("small_pieces")
def test_packing_keeps_every_sequence_at_any_depth_also_in_the_last_file(unpacked, tmp_path, depth):
    pack(unpacked, tmp_path / "packed", depth=depth)
    assert packed_sequences(tmp_path / "packed") == unpacked_sequences(unpacked)
    rows = [shard.rows for shard in find_shards(tmp_path / "packed")]
    metadata = json.loads((tmp_path / "packed_metadata.json").read_text())
    assert sum(rows) == metadata["new_number_of_samples"] and max(rows) == 7
    assert len(rows) == -(-sum(rows) // 7)


@given(lengths=st.lists(st.lists(st.integers(5, 40), max_size=12), min_size=1, max_size=3).filter(any),
       depth=st.integers(1, 9), method=st.sampled_from(list(METHODS.values())), seed=st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_packing_keeps_any_multiset_of_sequences(tmp_path_factory, lengths, depth, method, seed):
    folder = tmp_path_factory.mktemp("any")
    for number, in_shard in enumerate(lengths):
        write_unpacked_shard(folder / "unpacked" / f"a_training_{number}.hdf5", np.array(in_shard, int), seed, 40, 6)
    depth = min(depth, method.max_depth)
    pack(folder / "unpacked", folder / "packed", "--packing_method", method.name, "--seed", str(seed),
         length=40, predictions=6, depth=depth)
    assert packed_sequences(folder / "packed") == unpacked_sequences(folder / "unpacked")


def test_a_set_of_one_sequence_is_packed(tmp_path):
    write_unpacked_shard(tmp_path / "unpacked" / "one_training.hdf5", [17])
    pack(tmp_path / "unpacked", tmp_path / "packed")
    assert sum(packed_sequences(tmp_path / "packed").values()) == 1
    assert packed_sequences(tmp_path / "packed") == unpacked_sequences(tmp_path / "unpacked")


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


def test_metadata_describe_the_set(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed", "--packing_method", "nnls", "--seed", "7")
    metadata = json.loads((tmp_path / "packed_metadata.json").read_text())
    with h5py.File(tmp_path / "packed" / "mixed_strategies_part_0.hdf5") as file:
        mask, weights = file["input_mask"][...], file["next_sentence_weights"][...]
    rows, tokens = len(mask), np.count_nonzero(mask)
    strategies = Counter(tuple(np.bincount(row)[1:][:row.max()].tolist()) for row in mask)
    assert weights.sum() == 104
    assert metadata == {
        "avg_seq_per_sample": pytest.approx(104 / rows), "compression_ratio": pytest.approx(1 - rows / 104),
        "expected_speed_up": pytest.approx(104 / rows), "theoretical_speed_up": pytest.approx(104 * 128 / tokens),
        "new_number_of_samples": rows, "original_number_of_samples": 104, "number_of_sequences_dropped": 0,
        "number_of_strategies_utilized": len(strategies), "packing_efficiency": pytest.approx(tokens / (rows * 128)),
        "padding_tokens_original_dataset": 104 * 128 - tokens,
        "padding_tokens_packed_dataset": rows * 128 - tokens, "rows_per_sequence": pytest.approx(rows / 104),
        "most_frequent_strategies": metadata["most_frequent_strategies"],
        "top_8_strategies": [reference_index(strategy, 128, 3) for strategy in metadata["most_frequent_strategies"]],
        "lower_bound_of_samples": metadata["lower_bound_of_samples"], "packing_method": "nnls",
        "max_sequences_per_pack": 3, "max_sequence_length": 128, "max_predictions_per_sequence": 20, "seed": 7,
        "input_dir": str(unpacked), "input_files": [f"tiny_training_{number}.hdf5" for number in range(3)],
        "token_counts": metadata["token_counts"]}
    assert sum(map(int, metadata["token_counts"].split())) == tokens - 3 * 104, "without [CLS] and two [SEP] a sequence"
    top = [tuple(strategy) for strategy in metadata["most_frequent_strategies"]]
    assert sorted(strategies[strategy] for strategy in top) == sorted(strategies.values())[-8:]
    assert -(-tokens // 128) <= metadata["lower_bound_of_samples"] <= rows


@pytest.mark.usefixtures("small_pieces")
def test_result_depends_on_the_seed_alone(unpacked, tmp_path):
    pack(unpacked, tmp_path / "one")
    pack(unpacked, tmp_path / "again")
    pack(unpacked, tmp_path / "other", "--seed", "43")
    assert contents(tmp_path / "one") == contents(tmp_path / "again")
    assert contents(tmp_path / "one") != contents(tmp_path / "other")
    assert packed_sequences(tmp_path / "one") == packed_sequences(tmp_path / "other")


def test_result_does_not_depend_on_the_number_of_processes(unpacked, tmp_path):
    pack(unpacked, tmp_path / "one")
    subprocess.run([sys.executable, SCRIPT, *flags(unpacked, tmp_path / "two", "--n_processes", "2")], check=True,
                   timeout=60)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_rows_are_shuffled_over_the_whole_set(tmp_path, monkeypatch):
    monkeypatch.setattr(scatter_gather, "TOKENS_PER_PART", 50 * 128)
    for number, length in enumerate((128, 64, 30)):  # three kinds of row, one a shard
        write_unpacked_shard(tmp_path / "unpacked" / f"a_training_{number}.hdf5", np.full(200, length), seed=number)
    pack(tmp_path / "unpacked", tmp_path / "packed", depth=4)
    kinds = [read_rows(shard, ["input_mask"])["input_mask"].max(axis=1) for shard in find_shards(tmp_path / "packed")]
    assert len(kinds) == 7
    overall = np.bincount(np.concatenate(kinds))
    assert overall.tolist() == [0, 200, 100, 0, 50]
    for part in kinds[:-1]:
        assert np.abs(np.bincount(part, minlength=5) - overall / 7).max() < 15
        assert np.count_nonzero(np.diff(part)) > 15


def test_shards_written_by_others_are_read(unpacked, tmp_path):
    for path in unpacked.glob("*.hdf5"):
        with h5py.File(path) as file:
            rows = {key: file[key][...].astype(np.int64) for key in file}
        path.unlink()
        with h5py.File(path, "w") as file:
            for key, values in rows.items():
                file[key] = values
    before = unpacked_sequences(unpacked)
    with h5py.File(path, "r+") as file:
        file["written_by"] = "somebody else"
    (unpacked / "notes.txt").write_text("no shard")
    pack(unpacked, tmp_path / "packed")
    assert packed_sequences(tmp_path / "packed") == before


def test_picture_is_drawn(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed", "--plot", str(tmp_path / "pictures" / "packing.png"))
    assert (tmp_path / "pictures" / "packing.png").read_bytes().startswith(b"\x89PNG")


# --- existing output ---

def test_second_run_does_not_mix_with_the_first(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="in use already.*--overwrite"):
        pack(unpacked, tmp_path / "packed", depth=2)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("small_pieces")
def test_overwrite_leaves_nothing_of_the_first_run(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed", depth=1)  # more parts than the second run has
    (tmp_path / "packed" / "packing_in_progress").mkdir()  # as a killed run leaves it
    pack(unpacked, tmp_path / "packed", "--overwrite", depth=4)
    pack(unpacked, tmp_path / "fresh", depth=4)
    assert contents(tmp_path / "packed") == contents(tmp_path / "fresh")


def test_failed_overwrite_keeps_the_first_run(unpacked, tmp_path):
    pack(unpacked, tmp_path / "packed")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="fits"):
        pack(unpacked, tmp_path / "packed", "--overwrite", predictions=1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_no_output(tmp_path, stop):
    rng = np.random.default_rng(0)
    write_unpacked_shard(tmp_path / "unpacked" / "a_training.hdf5", rng.integers(5, 129, 20_000))
    command = [sys.executable, SCRIPT, *flags(tmp_path / "unpacked", tmp_path / "packed", "--n_processes", "2")]
    # A shell that runs the tests in the background has them ignore Ctrl-C; the command must not inherit that.
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    while not (tmp_path / "packed" / "packing_in_progress").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors and "Traceback" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]


def write_late(path, fail):
    """A task that fails at once, or writes a file after a while."""
    if fail:
        raise UserError("failed")
    time.sleep(0.5)
    Path(path).write_text("late")


def test_no_task_goes_on_writing_after_another_failed(tmp_path):
    tasks = [(tmp_path / "0", True), (tmp_path / "1", False), (tmp_path / "2", False)]
    with open_pool(2) as pool:
        with pytest.raises(UserError, match="failed"), closing(ordered_map(pool, write_late, tasks)) as results:
            list(results)
        before = contents(tmp_path)
        time.sleep(1)
        assert contents(tmp_path) == before


# --- bad input ---

def change(key, row, column, value):
    """A function that changes one number of a shard."""
    def apply(folder):
        with h5py.File(folder / "tiny_training_2.hdf5", "r+") as file:
            file[key][row, column] = value
    return apply


def pack_into(folder):
    pack(folder, folder.parent / "once")
    for path in folder.iterdir():
        path.unlink()
    (folder.parent / "once" / "mixed_strategies_part_0.hdf5").rename(folder / "tiny_training_2.hdf5")


def delete_key(folder):
    with h5py.File(folder / "tiny_training_2.hdf5", "r+") as file:
        del file["segment_ids"]


BAD_INPUT = {
    "empty row": (change("input_mask", 4, slice(None), 0), {}, r"tiny_training_2.hdf5: row 4 is empty"),
    "gap in the mask": (change("input_mask", 32, 1, 0), {}, r"tiny_training_2.hdf5: row 32 has a gap in its input_m"),
    "packed mask": (change("input_mask", 0, 3, 2), {}, r"tiny_training_2.hdf5: row 0 .* not 0 or 1"),
    "prediction in the padding": (change("masked_lm_positions", 5, 0, 127), {}, r"row 5 has a masked_lm_position outs"),
    "packed already": (pack_into, {}, r"tiny_training_2.hdf5 is packed already"),
    "missing key": (delete_key, {}, r"tiny_training_2.hdf5: no data set segment_ids"),
    "other length": (lambda folder: write_unpacked_shard(folder / "tiny_training_3.hdf5", [9], sequence_length=64), {},
                     r"tiny_training_3.hdf5 is unpacked, 64 tokens"),
    "length of the flag": (None, {"length": 64}, r"--max_sequence_length 64, but .*_0.hdf5 has rows of 128 tokens"),
    "no HDF5": (lambda folder: (folder / "a_training.hdf5").write_text("text"), {}, r"a_training.hdf5: not a readable"),
    "too few predictions": (None, {"predictions": 3}, r"have \d+ masked tokens, but has room for 6; .* \d+ fits"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
@pytest.mark.usefixtures("small_pieces")
def test_bad_input_is_named_and_leaves_no_output(unpacked, tmp_path, case):
    spoil, options, message = BAD_INPUT[case]
    if spoil:
        spoil(unpacked)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        pack(unpacked, tmp_path / "packed", **options)
    assert contents(tmp_path) == before
    assert not (tmp_path / "packed").exists()


def test_named_number_of_predictions_is_the_smallest_that_fits(unpacked, tmp_path):
    with pytest.raises(UserError) as error:
        pack(unpacked, tmp_path / "packed", predictions=1)
    fitting = int(str(error.value).split()[-2])
    with pytest.raises(UserError):
        pack(unpacked, tmp_path / "packed", predictions=fitting - 1)
    pack(unpacked, tmp_path / "packed", predictions=fitting)
    assert packed_sequences(tmp_path / "packed") == unpacked_sequences(unpacked)


@pytest.mark.parametrize("output", [".", "inside", "inside/deeper"])
def test_output_inside_the_input_is_refused(unpacked, output):
    before = contents(unpacked)
    with pytest.raises(UserError, match="lies inside --input_dir"):
        pack(unpacked, unpacked / output)
    assert contents(unpacked) == before


def test_output_among_shards_of_others_is_refused_even_with_overwrite(unpacked, tmp_path):
    write_unpacked_shard(tmp_path / "packed" / "mine.hdf5", [9])
    with pytest.raises(UserError, match="holds mine.hdf5"):
        pack(unpacked, tmp_path / "packed", "--overwrite")


def test_output_that_is_a_file_is_refused(unpacked, tmp_path):
    (tmp_path / "packed").write_text("text")
    with pytest.raises(UserError, match="not a folder"):
        pack(unpacked, tmp_path / "packed")


def test_too_little_space_is_found_before_anything_is_written(unpacked, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(UserError, match="needed for temporary files"):
        pack(unpacked, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(("more", "message"), [
    (["--packing_method", "nnls", "--max_sequences_per_pack", "4"], "nnls packs at most 3 sequences a row"),
    (["--max_sequence_lenght", "128"], "--max_sequence_lenght"),
    (["--input-dir", "nowhere"], "nowhere: no such folder")])
def test_mistakes_end_in_one_line_and_exit_code_2(unpacked, tmp_path, more, message):
    result = subprocess.run([sys.executable, SCRIPT, *flags(unpacked, tmp_path / "packed"), *more],
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "packed").exists()
