"""Calls that write to one folder at the same time: on other files side by side, on the same ones refused."""

import os
import subprocess
from pathlib import Path

import pytest

import create_pretraining_data
import export_to_huggingface
import pack_pretraining_data_pytorch
from common.errors import UserError
from common.locks import LOCK_NAME
from data import bertPrep
from tests.support import samples
from tests.support.held_folder import held_folder
from tests.support.preparation import ROOT, command, files_below, write_documents, write_vocabulary

FLAGS = ("--max_seq_length", 32, "--max_predictions_per_seq", 5, "--n_processes", 1)
HDF5 = "hdf5_*/wikicorpus_en"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working folder with text shards and a vocabulary."""
    monkeypatch.setenv("BERT_PREP_WORKING_DIR", str(tmp_path / "work"))
    write_documents(tmp_path / "text.txt", [5] * 40)
    write_vocabulary(tmp_path / "vocab.txt")
    stage("sharding", "--input_files", tmp_path / "text.txt", "--n_training_shards", 5, "--n_test_shards", 1)
    return tmp_path / "work"


def stage(action: str, *flags) -> None:
    bertPrep.main([str(word) for word in command(action, *flags, "--n_processes", 1, dataset="wikicorpus_en")[2:]])


def hdf5_flags(folder: Path, *shards) -> list:
    return ["--vocab_file", folder.parent / "vocab.txt", *FLAGS, *(["--input_files", *shards] if shards else [])]


def text_shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("sharded_*/wikicorpus_en/*.txt"))


def test_an_array_of_calls_makes_what_one_call_makes(folder):
    """Each has a part of the six shards.  What a killed call has left of a file goes, and nothing else."""
    shards = text_shards(folder)
    calls = [[*shards, "--part", "1/3"], [*shards, "--part", "2/3"], [*shards, "--part", "7/7"], [shards[2], shards[5]]]
    jobs = [subprocess.Popen(command("create_hdf5_files", *hdf5_flags(folder, *words), dataset="wikicorpus_en"),
                             cwd=ROOT, env=os.environ, stderr=subprocess.PIPE) for words in calls]
    assert [(job.communicate()[1][-500:], job.returncode) for job in jobs if job.wait()] == []
    output, = folder.glob("hdf5_*")
    found = files_below(output)
    assert len(found) == 12 and not any(LOCK_NAME in name or name.endswith(".tmp") for name in found)
    for path in output.rglob("*.hdf5"):
        path.unlink()
    stage("create_hdf5_files", *hdf5_flags(folder, *shards))
    assert files_below(output) == found


@pytest.mark.parametrize("action, part, message", [
    ("sharding", "1/2", "--part is for --action create_hdf5_files, not for sharding"),
    ("create_hdf5_files", "3/2", "'3/2' is not K/N"), ("create_hdf5_files", "0/2", "'0/2' is not K/N")])
def test_a_part_that_cannot_be_is_refused(tmp_path, action, part, message):
    done = subprocess.run(command(action, "--part", part, dataset="mine"), cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"BERT_PREP_WORKING_DIR": str(tmp_path / "work")})
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "work").exists()


def test_a_call_leaves_the_files_of_another_alone_and_is_refused_those(folder):
    first, second, *_ = text_shards(folder)
    stage("create_hdf5_files", *hdf5_flags(folder, second))
    output, = folder.glob(HDF5)
    records = output.parent / "records/wikicorpus_en"
    mine = [output / f".{second.stem}.hdf5.ab12.tmp", records / f".{second.stem}.hdf5.json.ab12.tmp"]
    others = [output / f".{first.stem}.hdf5.12.tmp", records / f".{first.stem}.hdf5.json.12.tmp",
              output.parent / "records/.bookscorpus.json.12.tmp"]
    for path in (*mine, *others):
        path.write_text("half")
    with held_folder(output) as owner:
        lock = output / f".{first.stem}.hdf5{LOCK_NAME}"
        (output / LOCK_NAME).rename(lock)
        (output / f"{second.stem}.hdf5").unlink()
        stage("create_hdf5_files", *hdf5_flags(folder, second))
        assert (output / f"{second.stem}.hdf5").exists()
        assert [path.exists() for path in (*mine, *others)] == [False, False, True, True, True]
        with pytest.raises(UserError, match=f"{first.stem}.hdf5: in use by .*, process {owner.pid} on host .*, start"):
            stage("create_hdf5_files", *hdf5_flags(folder, first))
        assert all(path.exists() for path in others) and lock.exists()


COMMANDS = {
    "work/formatted_one_article_per_line/bookscorpus": (
        bertPrep, "--action=text_formatting --dataset=bookscorpus --input_files text.txt"),
    "work/sharded_training_shards_2_test_shards_1_fraction_0.1/bookscorpus": (
        bertPrep, "--action=sharding --dataset=bookscorpus --input_files text.txt --n_training_shards=2 "
                  "--n_test_shards=1"),
    "work/vocab/bookscorpus": (
        bertPrep, "--action=create_vocabulary --dataset=bookscorpus --input_files a_training_1.txt"),
    "work/download/bookscorpus": (
        bertPrep, "--action=download --dataset=bookscorpus --input_files text.txt"),
    "packed": (pack_pretraining_data_pytorch, "--input_dir=data --output_dir=packed --max_sequence_length=24 "
                                              "--max_predictions_per_sequence=4 --n_processes=1"),
    "exported": (export_to_huggingface, "--checkpoint=c --config_file=c --vocab_file=v --output_dir=exported"),
    "new/": (create_pretraining_data, "--input_file=text.txt --output_file=new/x.hdf5 --vocab_file=vocab.txt"),
}


@pytest.mark.parametrize("place", COMMANDS)
def test_a_second_call_is_refused_in_one_line_and_changes_nothing(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BERT_PREP_WORKING_DIR", "work")
    samples.write_dataset(tmp_path / "data")
    write_vocabulary(tmp_path / "vocab.txt")
    for name in ("text.txt", "a_training_1.txt"):
        write_documents(tmp_path / name, [3] * 9)
    main, words = COMMANDS[place]
    with held_folder(tmp_path / place) as owner:
        if place.endswith("/"):  # the lock of a file in it
            (tmp_path / place / LOCK_NAME).rename(tmp_path / place / f".x.hdf5{LOCK_NAME}")
        (tmp_path / place / ".half_written.tmp").write_text("half")
        before = files_below(tmp_path)
        with pytest.raises(UserError, match=f"in use by -c, process {owner.pid} on host .*, started ") as refusal:
            main.main(words.split())
        assert "\n" not in str(refusal.value)
        assert files_below(tmp_path) == before
