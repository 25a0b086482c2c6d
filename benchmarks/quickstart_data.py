"""The quickstart's text as training samples of any length, for the benchmarks of how a small BERT learns.

A folder is the output folder of quickstart.sh, of which the text shards are taken.  Where there are none, the first
stages of data preparation make them there.  All else is made once and kept below benchmarks/ in that folder:

    vocabulary_2048/vocab/…/vocab.txt     a WordPiece vocabulary of the training shards
    vocabulary_2048/hdf5_…/               samples: of the training shards without masks, five passes over the text;
                                          of the held-out shards with 15 % masks, one pass
    vocabulary_2048/packed/16_0.4/        the training samples packed, as the quickstart trains on them

Delete a folder to make it again.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from measuring import ROOT  # puts the repository's root on the path

# isort: split
from common.errors import UserError
from data.preparation import layout
from data.preparation.samples import SampleOptions

DATASET = "wikicorpus_en_sample"
TEXT_STAGES = ("download", "text_formatting", "sharding")
TRAINING_PASSES = 5
HELD_OUT_SHARE = 0.15  # masked, whatever the training masks, so that the losses can be compared
CONFIG = ROOT / "scripts" / "quickstart_config.json"


@dataclass(frozen=True)
class SampleSet:
    """What the samples of a run are made with."""

    length: int  # tokens in a row
    masked_share: float  # of the tokens, in training
    vocab_size: int
    predictions: int = 0  # the most masked tokens in a training row; 0: as many as the share asks for

    @property
    def training(self) -> SampleOptions:
        return SampleOptions(max_seq_length=self.length, masked_lm_prob=self.masked_share, dynamic_masking=True,
                             max_predictions_per_seq=self.predictions or prediction_slots(self.length,
                                                                                         self.masked_share),
                             dupe_factor=TRAINING_PASSES)

    @property
    def held_out(self) -> SampleOptions:
        return SampleOptions(max_seq_length=self.length, masked_lm_prob=HELD_OUT_SHARE, dupe_factor=1,
                             max_predictions_per_seq=prediction_slots(self.length, HELD_OUT_SHARE))


@dataclass(frozen=True)
class SampleFolders:
    """Where the samples of a set are."""

    unpacked: Path
    packed: Path
    held_out: Path
    vocabulary: Path  # its file


def prediction_slots(length: int, masked_share: float) -> int:
    return max(1, round(length * masked_share))


def prepared_samples(output: Path, samples: SampleSet) -> SampleFolders:
    """The folders of a set, made where they are missing."""
    output = Path(output).absolute()
    work = output / "benchmarks" / f"vocabulary_{samples.vocab_size}"
    vocabulary = work / "vocab" / DATASET / "vocab.txt"
    if not vocabulary.exists():
        training_texts = text_shards(output, "training")
        run_stage(work, "create_vocabulary", "--vocab_size", samples.vocab_size, "--input_files", *training_texts)
    unpacked, held_out = (hdf5_shards(output, vocabulary, split, options) for split, options in
                          (("training", samples.training), ("test", samples.held_out)))
    return SampleFolders(unpacked, packed_rows(work, unpacked, samples), held_out, vocabulary)


def text_shards(output: Path, split: str) -> list[Path]:
    """The text shards of the quickstart, "training" or "test"; made where there are none."""
    pattern = f"data/sharded_*/{DATASET}/*_{split}_*.txt"
    if not any(output.glob(pattern)):
        for stage in TEXT_STAGES:
            run_stage(output / "data", stage)
    return sorted(output.glob(pattern))


def hdf5_shards(output: Path, vocabulary: Path, split: str, options: SampleOptions) -> Path:
    """The folder of the samples of the training or the test shards."""
    texts = text_shards(output, split)
    work = vocabulary.parent.parent.parent
    folder = work / layout.hdf5_folder(options).name / DATASET
    if len(list(folder.glob(f"*_{split}_*.hdf5"))) < len(texts):
        run_stage(work, "create_hdf5_files", "--input_files", *texts, "--vocab_file", vocabulary,
                  *(["--dynamic_masking"] if options.dynamic_masking else []),
                  *(f"--{name}={getattr(options, name)}" for name in ("max_seq_length", "max_predictions_per_seq",
                                                                     "masked_lm_prob", "dupe_factor")))
    return folder


def packed_rows(work: Path, unpacked: Path, samples: SampleSet) -> Path:
    folder = work / "packed" / f"{samples.length}_{samples.masked_share}"
    if not folder.with_name(f"{folder.name}_metadata.json").exists():
        run_command(["pack_pretraining_data_pytorch.py", "--input_dir", unpacked, "--output_dir", folder,
                     "--max_sequence_length", samples.length, "--max_predictions_per_sequence",
                     samples.training.max_predictions_per_seq], os.environ)
    return folder


def run_stage(work: Path, action: str, *flags) -> None:
    """A stage of data preparation, with `work` as its working folder."""
    run_command(["data/bertPrep.py", "--dataset", DATASET, "--action", action, *flags],
                {**os.environ, "BERT_PREP_WORKING_DIR": str(work)})


def run_command(words: list, environment) -> None:
    """A command of this repository.  Its progress bars are shown, its other lines are not."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"{' '.join(map(str, words[:5]))} … ended with exit code {done.returncode}")


def write_model_config(path: Path, vocabulary: Path, **changes) -> None:
    """The quickstart's model config with some values changed, for the number of tokens in a vocabulary."""
    tokens = len(vocabulary.read_text(encoding="utf-8").splitlines())
    values = {**json.loads(CONFIG.read_text(encoding="utf-8")), **changes, "vocab_size": tokens}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")


def default_output() -> str:
    """The quickstart's output folder, as quickstart.sh names it."""
    return os.environ.get("QUICKSTART_OUTPUT") or str(ROOT / "quickstart_output")
