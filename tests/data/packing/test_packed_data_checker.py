"""The checker: silent on what the packer writes, and loud, with file, row and reason, on anything else."""

import json
import re
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from data.packing import scatter_gather
from data.packing.fingerprints import sequence_fingerprints
from data.shards import columns
from pack_pretraining_data_pytorch import main as pack
from pytorch_packed_data_checker import main as check
from tests.support.synthetic import unpacked_rows, write_unpacked_shard


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with unpacked shards, and what the packer made of them in three parts."""
    folder = tmp_path_factory.mktemp("originals")
    rng = np.random.default_rng(3)
    for number, rows in enumerate((60, 41)):
        write_unpacked_shard(folder / "unpacked" / f"a_training_{number}.hdf5", rng.integers(5, 129, rows), seed=number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter_gather, "TOKENS_PER_PART", 20 * 128)
        pack(["--input_dir", str(folder / "unpacked"), "--output_dir", str(folder / "packed"), "--max_sequence_length",
              "128", "--max_predictions_per_sequence", "20", "--n_processes", "1", "--disable_progress_bar"])
    assert len(list((folder / "packed").glob("*.hdf5"))) == 3
    return folder


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals, tmp_path / "copy")


def run(folder, *flags):
    return check(["--input_dir", str(folder / "packed"), "--n_processes", "1", "--disable_progress_bar", *flags])


def test_what_the_packer_wrote_has_no_fault(folder, capsys):
    assert run(folder, "--unpacked_dir", str(folder / "unpacked")) == 0
    rows = json.loads((folder / "packed_metadata.json").read_text())["new_number_of_samples"]
    assert f"{rows} rows in 3 shards, 101 sequences, the same as in" in capsys.readouterr().out


def test_predictions_a_sequence_may_be_given_as_in_the_packing_command(folder):
    for most in ("20", "20.0", "80"):
        assert run(folder, "--max_predictions_per_sequence", most) == 0
    with pytest.raises(UserError, match="made with 20 predictions a sequence, but .*is 19"):
        run(folder, "--max_predictions_per_sequence=19")


def test_set_without_metadata_is_checked_over_processes(folder, capsys):
    (folder / "packed_metadata.json").unlink()
    assert check(["--input_dir", str(folder / "packed"), "--n_processes", "2"]) == 0
    assert "101 sequences: no fault" in capsys.readouterr().out


def first(values, condition):
    """The first index at which a condition holds."""
    return tuple(np.argwhere(condition(values))[0])


def misnumber(rows):
    row, offset = first(rows["input_mask"], lambda mask: mask == 2)
    rows["input_mask"][row, offset] = 3
    return row


def empty_but_for_a_weight(rows):
    for values in rows.values():
        values[8] = 0
    rows["next_sentence_weights"][8, 0] = 1
    return 8


def number_after_padding(rows):
    row, offset = first(rows["input_mask"], lambda mask: mask == 0)
    rows["input_mask"][row, offset + 1:] = 1
    return row


def join_positions(rows):
    row, offset = first(rows["input_mask"], lambda mask: mask == 2)
    rows["positions"][row, offset:] += 1
    return row


def fill(key, value):
    def spoil(rows):
        row, offset = first(rows["input_mask"], lambda mask: mask == 0)
        rows[key][row, offset] = value
        return row
    return spoil


def put(key, row, column, value):
    def spoil(rows):
        rows[key][row, column] = value
        return row
    return spoil


def mask_a_separator(rows):
    rows["masked_lm_positions"][3, 0] = np.count_nonzero(rows["input_mask"][3] == 1) - 1
    return 3


def repeat_a_position(rows):
    rows["masked_lm_positions"][4, 1] = rows["masked_lm_positions"][4, 0]
    return 4


def leave_a_gap(rows):
    rows["masked_lm_positions"][4, 0] = rows["masked_lm_ids"][4, 0] = 0
    return 4


FAULTS = {
    "input_mask does not number": (misnumber, empty_but_for_a_weight, number_after_padding,
                                   put("input_mask", 2, slice(None), 4)),
    "positions do not restart": (join_positions, fill("positions", 1)),
    "input_ids are not 0 in the padding": (fill("input_ids", 1),),
    "segment_ids are not 0 in the padding": (fill("segment_ids", 1),),
    "segment_ids are neither 0 nor 1": (put("segment_ids", 2, 3, 2),),
    "a sequence does not begin with [CLS]": (put("input_ids", 11, 0, 102),),
    "next_sentence_positions are not": (put("next_sentence_positions", 5, 0, 1),),
    "next_sentence_weights are not": (put("next_sentence_weights", 5, 0, 0),),
    "next_sentence_labels are neither": (put("next_sentence_labels", 5, 0, 2),),
    "used after an empty slot": (leave_a_gap,),
    "outside all sequences": (put("masked_lm_positions", 6, 0, 128), put("masked_lm_positions", 6, 0, -1)),
    "occurs twice": (repeat_a_position,),
    "masked_lm_ids are not above 0": (put("masked_lm_ids", 7, 0, 0), put("masked_lm_ids", 7, 22, 9)),
    "that of a [CLS] or [SEP]": (mask_a_separator,),
}


@pytest.mark.parametrize(("reason", "spoil"), [(reason, spoil) for reason, ways in FAULTS.items() for spoil in ways])
def test_each_fault_is_named_with_its_file_row_and_reason(folder, capsys, reason, spoil):
    path = folder / "packed" / "mixed_strategies_part_1.hdf5"
    with h5py.File(path, "r+") as file:
        rows = {key: file[key][...] for key in file}
        row = spoil(rows)
        for key, values in rows.items():
            file[key][...] = values
    assert run(folder, "--unpacked_dir", str(folder / "unpacked")) == 1
    first_line, last_line = capsys.readouterr().out.splitlines()
    assert first_line.startswith(f"{path}: row {row}: ") and reason in first_line
    assert last_line.endswith(": 1 faults, the first is named above")


def test_masked_positions_with_the_wrong_offset_are_found(tmp_path, capsys):
    write_unpacked_shard(tmp_path / "unpacked" / "a_training.hdf5", np.full(40, 200), 0, 400, 60)
    pack(["--input_dir", str(tmp_path / "unpacked"), "--output_dir", str(tmp_path / "packed"), "--max_sequence_length",
          "400", "--max_predictions_per_sequence", "60", "--n_processes", "1", "--disable_progress_bar"])
    path = tmp_path / "packed" / "mixed_strategies_part_0.hdf5"
    with h5py.File(path, "r+") as file:
        positions = file["masked_lm_positions"][9]
        second = (positions > 202) & (positions < 398)
        assert np.count_nonzero(second) > 20
        segments = file["segment_ids"][9]
        segments[200:] = segments[398]  # no [SEP] in the way: only the tokens tell
        file["segment_ids"][9] = segments
        file["masked_lm_positions"][9] = np.where(second, positions - 1, positions)
    assert run(tmp_path) == 1
    assert "row 9: the masked_lm_positions of a sequence do not point at [MASK]" in capsys.readouterr().out


def test_faults_are_counted_over_all_shards(folder, capsys):
    for part, rows in ((0, [3, 5]), (2, [1])):
        with h5py.File(folder / "packed" / f"mixed_strategies_part_{part}.hdf5", "r+") as file:
            file["positions"][rows, 0] = 7
            file["next_sentence_weights"][rows[:1], 0] = 0
    assert run(folder) == 1
    output = capsys.readouterr().out
    assert "part_0.hdf5: row 3: positions do not" in output and ": 3 faults, the first is named above" in output


def test_changed_token_is_found_by_comparing(folder, capsys):
    path = folder / "packed" / "mixed_strategies_part_2.hdf5"
    with h5py.File(path, "r+") as file:
        file["input_ids"][5, 2] += 1
    assert run(folder) == 0
    capsys.readouterr()
    assert run(folder, "--unpacked_dir", str(folder / "unpacked")) == 1
    assert f"{path}: row 5, sequence 1: is not in the unpacked set" in capsys.readouterr().out


def test_lost_sequence_is_found_and_named(folder, capsys):
    (folder / "packed_metadata.json").unlink()
    write_unpacked_shard(folder / "unpacked" / "b_training.hdf5", [50], seed=99)
    assert run(folder, "--unpacked_dir", str(folder / "unpacked")) == 1
    output = capsys.readouterr().out
    assert "b_training.hdf5: row 0, sequence 1: is not in the packed set" in output and ": 1 faults" in output


def test_sequence_packed_twice_is_found(folder, capsys):
    """A copy of a whole shard: every row is sound, and every sequence stands in the unpacked set."""
    (folder / "packed_metadata.json").unlink()
    shutil.copy(folder / "packed" / "mixed_strategies_part_2.hdf5", folder / "packed" / "mixed_strategies_part_3.hdf5")
    assert run(folder) == 0
    assert run(folder, "--unpacked_dir", str(folder / "unpacked")) == 1
    assert re.search(r"part_\d.hdf5: row \d+, sequence \d: is not in the unpacked set, or less often",
                     capsys.readouterr().out)


def test_shards_that_do_not_match_their_metadata_are_a_fault(folder, capsys):
    (folder / "packed" / "mixed_strategies_part_2.hdf5").unlink()
    assert run(folder) == 1
    assert "packed_metadata.json: names" in capsys.readouterr().out


def test_packing_that_was_cut_short_is_a_fault(folder, capsys):
    (folder / "packed" / "packing_in_progress").mkdir()
    assert run(folder) == 1
    assert "was cut short" in capsys.readouterr().out


def test_what_is_no_packed_set_cannot_be_checked(folder):
    with pytest.raises(UserError, match="--input_dir .*its shards are unpacked"):
        check(["--input_dir", str(folder / "unpacked")])
    with pytest.raises(UserError, match="--unpacked_dir .*its shards are packed"):
        run(folder, "--unpacked_dir", str(folder / "packed"))


@given(key=st.sampled_from(list(columns(packed=False))).filter(lambda key: key != "input_mask"),
       seed=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_fingerprint_changes_with_any_part_of_a_sequence_and_not_with_its_row(key, seed):
    rng = np.random.default_rng(seed)
    rows = unpacked_rows(rng.integers(5, 25, 6), rng, 24, 4)
    before = sequence_fingerprints(rows)
    assert len(set(before.tolist())) == 6
    order = rng.permutation(6)
    assert (sequence_fingerprints({name: values[order] for name, values in rows.items()}) == before[order]).all()
    spoiled = {name: values.copy() for name, values in rows.items()}
    if key == "next_sentence_labels":
        spoiled[key][2] ^= 1
    else:
        spoiled[key][2, 0] += 1
    after = sequence_fingerprints(spoiled)
    assert after[2] != before[2]
    assert (np.delete(after, 2) == np.delete(before, 2)).all()
