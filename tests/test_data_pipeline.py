"""Claims about the stages of data preparation, on the commands themselves and on real text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import shards

ROOT = Path(__file__).parent.parent
SAMPLE = "wikicorpus_en_sample"


def prepare(folder, action: str, *flags: str, dataset: str = SAMPLE, status: int = 0) -> str:
    """Run bertPrep.py as a user does; returns what it printed, errors included."""
    command = [sys.executable, "data/bertPrep.py", "--action", action, "--dataset", dataset, *flags]
    outcome = subprocess.run(command, cwd=ROOT, env=os.environ | {"BERT_PREP_WORKING_DIR": str(folder)},
                             capture_output=True, text=True, check=False)
    printed = outcome.stdout + outcome.stderr
    assert outcome.returncode == status, printed
    assert "Traceback" not in printed
    return printed


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A working folder in which the sample went through all stages."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, "download")
    for action in ("text_formatting", "sharding"):
        prepare(folder, action, "--n_processes", "2")
    prepare(folder, "create_hdf5_files", "--n_processes", "2", "--max_seq_length", "128")
    return folder


def hdf5_folder(folder: Path) -> Path:
    return next(folder.glob("hdf5_*_seq_len_128_max_pred_20_*")) / SAMPLE


def test_the_sample_becomes_8_training_and_2_test_shards(sample):
    training, test = (shards.find(hdf5_folder(sample), split) for split in ("training", "test"))
    assert (len(training), len(test)) == (8, 2)
    assert sum(shard.rows for shard in training + test) > 25_000
    assert {(shard.sequence_length, shard.prediction_slots, shard.packed) for shard in training} == {(128, 20, False)}
