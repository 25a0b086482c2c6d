"""A small model with a checkpoint, a config and a vocabulary, for tests of what is done with a trained model."""

import torch
import transformers

import export_to_huggingface
from checkpoint.folder import write_checkpoint
from common.bert_config import BertConfig
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from modeling import BertForPreTraining
from tests.support import samples

WORDS = ["the", "sea", "deep", "##s", ".", "old"]
VOCAB_SIZE = 1003  # padded to 1008
LOADED = [("BertForPreTraining", None), ("BertForMaskedLM", "masked_lm"), ("BertModel", "encoder")]
FLAGS = {"checkpoint": "ckpt_7.pt", "config_file": "config.json", "vocab_file": "vocab.txt"}


def write(folder) -> None:
    """config.json, vocab.txt and ckpt_7.pt of varied_model()."""
    samples.write_config(folder / "config.json", vocab_size=VOCAB_SIZE, num_attention_heads=2)
    tokens = [*SPECIAL_TOKENS, *WORDS]
    save_vocabulary(folder / "vocab.txt", tokens + [f"[unused{n}]" for n in range(VOCAB_SIZE - len(tokens))])
    model = varied_model(folder / "config.json")
    write_checkpoint(folder, 7, {"model": model.state_dict(), "optimizer": None, "phase": 2, "step": 7})


def varied_model(config_file="config.json") -> BertForPreTraining:
    """A model whose weights are all different."""
    torch.manual_seed(3)
    model = BertForPreTraining(BertConfig.from_json_file(config_file)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def command_line(**changes) -> list[str]:
    return [f"--{name}={value}" for name, value in (FLAGS | changes).items()]


def export(**changes) -> None:
    """Export it to the folder `out`, as a user does."""
    export_to_huggingface.main(command_line(**{"output_dir": "out", **changes}))


def loaded(class_name, variant=None, folder="out"):
    """Their model from the folder, after checking that every weight found its place and none was left over."""
    model, report = getattr(transformers, class_name).from_pretrained(folder, variant=variant, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()
