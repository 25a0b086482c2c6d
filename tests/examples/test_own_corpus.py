"""examples/own_corpus/run.sh runs to its end on any published model."""

import os
import subprocess
import sys

import pytest
import transformers

from common.bert_config import BertConfig
from tests.support.preparation import ROOT, write_vocabulary

SENTENCE = "The [MASK] statement raises an exception."


@pytest.mark.slow
def test_the_example_goes_from_text_to_filled_in_masks(tmp_path):
    model = tmp_path / "model"
    vocabulary = write_vocabulary(tmp_path / "vocab.txt")
    transformers.BertModel(transformers.BertConfig(
        vocab_size=len(vocabulary.read_text().splitlines()), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64)).save_pretrained(model)
    vocabulary.rename(model / "vocab.txt")
    assert BertConfig.from_json_file(model / "config.json").hidden_size == 16
    environment = os.environ | {"MODEL": str(model), "STEPS": "2", "PYTHON": sys.executable}
    done = subprocess.run(["bash", ROOT / "examples/own_corpus/run.sh", tmp_path / "output"], env=environment,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(SENTENCE) == 3 and done.stdout.count("that is reached without context") == 5
    assert (tmp_path / "output/going_on/ckpt_2.pt").exists() and (tmp_path / "output/from_scratch/ckpt_2.pt").exists()
