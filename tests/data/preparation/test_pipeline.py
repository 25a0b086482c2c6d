"""Claims about data preparation as a whole: the commands themselves, on real articles of Wikipedia."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from common.locks import LOCK_NAME
from data.preparation import estimates, samples, sentences
from data.preparation.datasets import DATASETS
from data.shards import find_shards, read_rows
from data.tokenizer import WordPieceEncoder, load_vocabulary
from tests.support.preparation import ROOT, SAMPLE, STAGES, command, files_below, prepare, text_shards

MPIRUN = shutil.which("mpirun", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
def hdf5_folder(folder: Path) -> Path:
    return next(folder.glob("hdf5_*_seq_len_128_max_pred_20_*")) / SAMPLE


def copy_of_download(sample: Path, folder: Path) -> Path:
    shutil.copytree(sample / "download", folder / "download")
    return folder


def stages_only(folder) -> dict[str, bytes]:
    """Without locks, of which a killed run leaves its own: it does not hold, and is removed when another is made."""
    return {name: content for name, content in files_below(folder).items()
            if not name.startswith("download/") and not name.endswith(LOCK_NAME)}


def test_the_sample_becomes_8_training_and_2_test_shards(sample):
    training, test = (find_shards(hdf5_folder(sample), split) for split in ("training", "test"))
    assert (len(training), len(test)) == (8, 2)
    assert sum(shard.rows for shard in training + test) > 25_000
    assert {(shard.sequence_length, shard.prediction_slots, shard.packed) for shard in training} == {(128, 20, False)}


def test_the_sample_is_split_level_and_a_tenth_of_its_sentences_is_held_out(sample):
    counts = {path.stem: sum(bool(line) for line in path.read_text().split("\n")) for path in text_shards(sample)}
    training = [count for name, count in counts.items() if "training" in name]
    test = [count for name, count in counts.items() if "test" in name]
    assert abs(sum(test) / sum(counts.values()) - 0.1) < 0.001
    assert max(training) / min(training) < 1.05 and max(test) / min(test) < 1.05


def test_every_document_is_in_exactly_one_shard(sample):
    formatted = (sample / "formatted_one_article_per_line" / SAMPLE / "part_00000.txt").read_text().splitlines()
    sharded = [document for path in text_shards(sample) for document in path.read_text().rstrip("\n").split("\n\n")]
    assert len(formatted) == 105
    assert sorted("".join(document.split()) for document in sharded) == sorted("".join(line.split())
                                                                               for line in formatted)


def test_sentences_of_the_method_nltk_are_those_of_nltks_punkt(sample):
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer
    from punkt import load_model

    model, parameters = load_model("english"), PunktParameters()
    parameters.abbrev_types = set(model.abbrev_types)
    parameters.collocations = set(model.collocations)
    parameters.sent_starters = set(model.sent_starters)
    parameters.ortho_context.update(model.ortho_context)
    nltk = PunktSentenceTokenizer(parameters)
    lines = (sample / "formatted_one_article_per_line" / SAMPLE / "part_00000.txt").read_text().splitlines()
    for line in lines[::5]:
        expected = [sentence for paragraph in line.split("\t") for sentence in nltk.tokenize(paragraph)]
        assert sentences.split_document(line, "nltk") == expected


@pytest.mark.parametrize("changes", [{}, {"max_seq_length": 512, "max_predictions_per_seq": 80},
                                     {"dynamic_masking": True}, {"dupe_factor": 2}], ids=str)
def test_the_estimates_of_what_the_stages_write_are_near_the_truth(sample, tmp_path, changes):
    dump, = sample.glob(f"download/{SAMPLE}/*.bz2")
    text = sum(path.stat().st_size for path in sample.glob("formatted_*/*/*.txt"))
    assert 1 / 1.5 < estimates.input_size([dump]) * DATASETS[SAMPLE].text_share / text < 1.5
    options = samples.SampleOptions(**{"max_seq_length": 128} | changes)
    shard = text_shards(sample)[-1]
    samples.create_shard(shard, tmp_path / "x.hdf5", load_vocabulary(sample / "vocab" / SAMPLE / "vocab.txt"), options)
    estimated = shard.stat().st_size * estimates.hdf5_share(options)
    assert 1 / 1.5 < estimated / (tmp_path / "x.hdf5").stat().st_size < 1.5


def test_rows_of_the_sample_hold_what_the_schema_says(sample):
    tokens = load_vocabulary(sample / "vocab" / SAMPLE / "vocab.txt")
    cls, sep, mask = (tokens.index(token) for token in ("[CLS]", "[SEP]", "[MASK]"))
    masked = random_labels = rows_in_all = predicted = 0
    fates = np.zeros(3, int)
    for shard in find_shards(hdf5_folder(sample)):
        rows = read_rows(shard)
        lengths = rows["input_mask"].sum(axis=1, dtype=int)
        column = np.arange(128)
        slot = rows["masked_lm_positions"] > 0
        row, _ = np.nonzero(slot)
        position, label = rows["masked_lm_positions"][slot], rows["masked_lm_ids"][slot]
        shown = rows["input_ids"][row, position]
        original = rows["input_ids"].copy()
        original[row, position] = label
        assert (rows["input_mask"] == (column < lengths[:, None])).all()
        assert not original[column >= lengths[:, None]].any()
        assert (original[:, 0] == cls).all() and ((original == sep).sum(axis=1) == 2).all()
        first_sep = (original == sep).argmax(axis=1)
        assert (original[np.arange(len(original)), lengths - 1] == sep).all() and (first_sep < lengths - 1).all()
        assert (rows["segment_ids"] == ((column > first_sep[:, None]) & (column < lengths[:, None]))).all()
        expected = np.minimum(20, np.maximum(1, np.rint(lengths * 0.15)))
        assert (slot.sum(axis=1) == expected).all() and not np.isin(label, [cls, sep]).any()
        assert not rows["masked_lm_ids"][~slot].any()
        fates += [(shown == mask).sum(), ((shown != mask) & (shown != label)).sum(), (shown == label).sum()]
        masked, predicted = masked + len(label), predicted + lengths.sum()
        random_labels, rows_in_all = random_labels + rows["next_sentence_labels"].sum(), rows_in_all + len(lengths)
    assert masked > 100_000
    assert (np.abs(fates / masked - [0.8, 0.1, 0.1]) < 0.01).all()
    assert abs(masked / predicted - 0.15) < 0.01
    assert 0.50 <= random_labels / rows_in_all <= 0.56


def test_no_pair_of_the_same_document_is_labelled_random(sample):
    """Every second segment that stands behind its first in some document of the shard is labelled a true one."""
    path = sample / "vocab" / SAMPLE / "vocab.txt"
    block, = samples.document_blocks(text_shards(sample)[-1])
    documents = samples.tokenize(block, WordPieceEncoder(load_vocabulary(path), True))
    pairs = samples.plan_pairs(documents, samples.SampleOptions(max_seq_length=128), random.Random(3))
    bounds = documents.bounds[documents.first]
    a, b = (np.searchsorted(bounds, start, side="right") for start in (pairs.a_start, pairs.b_start))
    assert ((a != b) == pairs.is_random.astype(bool)).all() and len(pairs) > 1000


def test_two_processes_make_the_bytes_of_one(sample, tmp_path):
    folder = copy_of_download(sample, tmp_path)
    for action, *flags in STAGES:
        prepare(folder, action, *flags, "--n_processes", 2)
    assert stages_only(folder) == stages_only(sample)


@pytest.mark.slow
@pytest.mark.skipif(not MPIRUN, reason="no mpirun")
def test_two_ranks_under_mpirun_make_the_bytes_of_one_process(sample, tmp_path):
    folder = copy_of_download(sample, tmp_path)
    launcher = [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", "2"]
    for action, *flags in STAGES:
        python, *arguments = command(action, *flags)
        outcome = subprocess.run([*launcher, python, "-m", "mpi4py.futures", *arguments], cwd=ROOT, text=True,
                                 env=os.environ | {"BERT_PREP_WORKING_DIR": str(folder)}, capture_output=True,
                                 check=False)
        assert outcome.returncode == 0, outcome.stdout + outcome.stderr
        assert "with 2 MPI ranks" in outcome.stdout
    assert stages_only(folder) == stages_only(sample)


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_ends_in_the_same_files(sample, tmp_path):
    folder = copy_of_download(sample, tmp_path)
    moments = random.Random(11)
    for action, *flags in STAGES:
        for _ in range(3):
            process = subprocess.Popen(command(action, *flags, "--n_processes", 2), cwd=ROOT, start_new_session=True,
                                       env=os.environ | {"BERT_PREP_WORKING_DIR": str(folder)},
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            time.sleep(moments.uniform(0.5, 2.5))
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        prepare(folder, action, *flags, "--n_processes", 2)
    assert stages_only(folder) == stages_only(sample)


def test_a_second_run_makes_nothing_anew(sample):
    before = {path: path.stat().st_mtime_ns for path in sample.rglob("*") if path.is_file()}
    for action, *flags in (("download",), *STAGES):
        prepare(sample, action, *flags)
    assert {path: path.stat().st_mtime_ns for path in sample.rglob("*") if path.is_file()} == before
