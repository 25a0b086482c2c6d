"""Training commands as users type them, made small: the sets in one_card_commands.txt and eight_card_commands.txt."""

import re
import shlex
from pathlib import Path

import numpy as np

import pack_pretraining_data_pytorch
from tests.support import gaudi, samples, synthetic

PREDICTIONS = {128: 20, 512: 80}
STEPS = 2


def read(name: str) -> dict[str, str]:
    """The commands of a file by what stands above them, without the interpreter."""
    text = (gaudi.ROOT / "tests" / "support" / name).read_text()
    return dict(re.findall(r"^# (\d cards?, .*)\n\$PYTHON (.*)$", text, re.MULTILINE))


def kinds(commands: dict[str, str]) -> list[str]:
    """What the commands are for, each once for both its phases."""
    return list(dict.fromkeys(name.split(", phase")[0] for name in commands))


def write_workspace(folder: Path) -> Path:
    """A small config, and a data set of each form for each phase."""
    samples.write_config(folder / "config.json", max_position_embeddings=512, num_hidden_layers=1, hidden_size=16,
                         num_attention_heads=2, intermediate_size=24)
    for length, predictions in PREDICTIONS.items():
        lengths = np.random.default_rng(length).integers(length // 4, length // 2, 12)
        synthetic.write_unpacked_shard(folder / f"unpacked_{length}" / "books_training_0.hdf5", lengths, 0, length,
                                       predictions)
        pack_pretraining_data_pytorch.main([
            f"--input_dir={folder}/unpacked_{length}", f"--output_dir={folder}/packed_{length}",
            f"--max_sequence_length={length}", f"--max_predictions_per_sequence={predictions}"])
    return folder


def small(command: str, folder: Path, phase: str, accumulation: int) -> list[str]:
    """A command with its paths, config, steps and batch (of 2 rows a micro-batch) made small; the rest as it stands."""
    length = re.search(r"--max_seq_length=(\d+)", command).group(1)
    data = f"{'unpacked' if '--enable_packed_data_mode False' in command else 'packed'}_{length}"
    changes = {"input_dir": folder / data, "output_dir": folder / "checkpoints", "config_file": folder / "config.json",
               "json-summary": folder / f"{phase}.json", "train_batch_size": 2 * accumulation,
               "gradient_accumulation_steps": accumulation, "max_steps": STEPS}
    words = []
    for word in shlex.split(command):
        flag, equals, _ = word.partition("=")
        changed = changes.pop(flag.removeprefix("--"), None) if equals else None
        words.append(word if changed is None else f"{flag}={changed}")
    assert not changes, "a flag that the command does not have"
    return words
