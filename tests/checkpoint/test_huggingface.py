"""Models in the folders of transformers: the same numbers there, and the way back is exact."""

import json

import pytest
import torch
import transformers
from torch.testing import assert_close

import run_pretraining
from checkpoint import huggingface
from checkpoint.folder import read_checkpoint, write_checkpoint
from checkpoint.load import load_model
from common.bert_config import BertConfig
from common.errors import UserError
from data.tokenizer import SPECIAL_TOKENS, save_vocabulary
from modeling import BertForPreTraining
from tests.support import samples, saved_model
from tests.support.saved_model import LOADED, VOCAB_SIZE, WORDS, export, loaded, varied_model
from tests.support.small_run import flags


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_model.write(tmp_path)
    return tmp_path


def batch_of(config) -> dict:
    batch = samples.unpacked_batch([24, 5, 11])
    words = torch.where(batch["input_ids"] > 0, batch["input_ids"] % (config.vocab_size - 1) + 1, 0)
    return {**batch, "input_ids": words, "masked_lm_ids": batch["masked_lm_ids"] % config.vocab_size}


def their_inputs(batch) -> dict:
    return {"input_ids": batch["input_ids"].long(), "attention_mask": batch["input_mask"].long(),
            "token_type_ids": batch["segment_ids"].long()}


def test_logits_of_an_exported_model_equal_ours(workspace):
    export()
    model = varied_model()
    batch = batch_of(model.config)
    used = batch["masked_lm_positions"] > 0
    rows = torch.arange(3)[:, None].expand_as(used)[used]
    places = rows, batch["masked_lm_positions"][used].long()
    with torch.no_grad():
        mlm, nsp = model.logits(batch)
        hidden, _ = model.bert(batch["input_ids"], batch["input_mask"], batch["segment_ids"], batch["positions"],
                               batch["next_sentence_positions"])
        both, masked_lm, encoder = (loaded(*which)(**their_inputs(batch)) for which in LOADED)
    ours = mlm[used][:, :VOCAB_SIZE]
    assert_close(both.prediction_logits[places], ours, atol=1e-5, rtol=1e-5)
    assert_close(masked_lm.logits[places], ours, atol=1e-5, rtol=1e-5)
    assert_close(both.seq_relationship_logits, nsp[:, 0], atol=1e-5, rtol=1e-5)
    real = batch["input_mask"].bool()
    assert_close(encoder.last_hidden_state[real], hidden[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("class_name, variant", LOADED)
def test_loading_warns_of_nothing(workspace, caplog, class_name, variant):
    export()
    transformers.utils.logging.enable_propagation()
    loaded(class_name, variant)
    transformers.utils.logging.disable_propagation()
    assert not [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_round_trip_is_exact(workspace):
    export()
    state = read_checkpoint("out")
    expected = varied_model().state_dict()
    assert set(state["model"]) == set(expected)
    for name, value in expected.items():
        assert torch.equal(state["model"][name], value), name
    assert len(expected["cls.predictions.bias"]) == 1008  # the padding too


def test_their_model_starts_our_training_and_predicts_no_padding(workspace):
    config = BertConfig.from_json_file("config.json")
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**vars(config), attn_implementation="eager"))
    theirs.eval().save_pretrained("theirs")
    model = BertForPreTraining(config).eval()
    load_model(model, read_checkpoint("theirs"), "theirs")
    batch = batch_of(config)
    labels = torch.full(batch["input_ids"].shape, -100)
    for row, positions in enumerate(batch["masked_lm_positions"]):
        places = positions[positions > 0].long()
        labels[row, places] = batch["masked_lm_ids"][row, :len(places)].long()
    with torch.no_grad():
        expected = theirs(**their_inputs(batch), labels=labels,
                          next_sentence_label=batch["next_sentence_labels"].long().flatten()).loss
        assert_close(model(batch)["loss"], expected, atol=1e-5, rtol=1e-5)


def test_old_files_of_theirs_are_read(workspace):
    """pytorch_model.bin, gamma and beta, as the first checkpoints had them; and weights spread over files."""
    export()
    weights = huggingface.read_tensors(workspace / "out" / "model.safetensors")
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
           for name, value in weights.items()}
    expected = {name: value[:VOCAB_SIZE] if len(value) == 1008 else value
                for name, value in varied_model().state_dict().items()}
    (workspace / "out" / "model.safetensors").unlink()
    torch.save(old, "out/pytorch_model.bin")
    for name, value in read_checkpoint("out")["model"].items():
        assert torch.equal(value[:len(expected[name])], expected[name]), name
    loaded("BertForMaskedLM", "masked_lm").save_pretrained("split", max_shard_size="20KB")
    assert len(list((workspace / "split").glob("*.safetensors"))) > 1
    spread = read_checkpoint("split")["model"]
    assert torch.equal(spread["cls.predictions.bias"][:VOCAB_SIZE], expected["cls.predictions.bias"])


def test_a_vocabulary_that_leaves_room_for_words_is_filled_up(workspace, capsys):
    tokens = (workspace / "vocab.txt").read_text().splitlines()
    save_vocabulary(workspace / "roomy.txt", [token for token in tokens if token != "[unused990]"][:-9])
    saved_model.export(vocab_file="roomy.txt")
    assert "993 tokens, but vocab_size in the config is 1003: the last 10 are named" in capsys.readouterr().err
    written = (workspace / "out" / "vocab.txt").read_text().splitlines()
    assert len(written) == len(set(written)) == VOCAB_SIZE


def test_tokenizers_of_the_folder_give_the_ids_of_the_vocabulary(workspace):
    export()
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    encoded = tokenizer("The SEAs [MASK] deep.", "old")
    assert encoded["input_ids"] == [2, 5, 6, 8, 4, 7, 9, 3, 10, 3]
    assert encoded["token_type_ids"] == [0] * 8 + [1] * 2
    assert tokenizer.model_max_length == 32 and tokenizer.pad_token_id == 0


def test_the_card_tells_the_facts_of_the_training(workspace):
    samples.write_config(workspace / "large.json")
    samples.write_dataset(workspace / "data")
    run_pretraining.main(flags(config_file="large.json", max_steps=2, skip_checkpoint=True, json_summary="log.json"))
    export(log="log.json", model_name="Small sea")
    card = (workspace / "out/README.md").read_text()
    assert "# Small sea" in card and "| Phase | 2 |" in card
    assert "| train_batch_size | 8 |" in card and "| learning_rate | 0.01 |" in card and "| final_loss | " in card
    assert "starting from" not in card and "padded to 1008 entries.  The 5 added" in card
    continued = (workspace / "log.json").read_text().replace('"init_checkpoint": null', '"init_checkpoint": "base.pt"')
    (workspace / "log.json").write_text(continued)
    export(log="log.json", output_dir="other")
    assert "starting from the weights of base.pt" in (workspace / "other/README.md").read_text()
    contents = read_checkpoint("ckpt_7.pt")
    write_checkpoint(workspace, 8, {**contents, "init_checkpoint": "bert-base-uncased"})
    export(checkpoint="ckpt_8.pt", output_dir="third")
    assert "starting from the weights of bert-base-uncased" in (workspace / "third/README.md").read_text()


@pytest.mark.parametrize("changes, said", [
    ({"vocab_file": "short.txt"}, "short.txt: 11 tokens, but vocab_size in the config is 1003"),
    ({"vocab_file": "nowhere.txt"}, "--vocab_file nowhere.txt: cannot be read"),
    ({"config_file": "wide.json"}, r"ckpt_7.pt: bert.*has shape .*the config makes it"),
    ({"output_dir": "used"}, "--output_dir used: in use already"),
    ({"output_dir": "config.json"}, "--output_dir config.json: in use already"),
    ({"checkpoint": "ckpt_8.pt"}, "ckpt_8.pt: no such checkpoint"),
    ({"checkpoint": "used"}, "used: a folder without config.json"),
])
def test_what_cannot_be_exported_is_refused_and_nothing_written(workspace, changes, said):
    save_vocabulary(workspace / "short.txt", [*SPECIAL_TOKENS, *WORDS])
    samples.write_config(workspace / "wide.json", vocab_size=VOCAB_SIZE, num_attention_heads=2, intermediate_size=48)
    (workspace / "used").mkdir()
    (workspace / "used" / "mine.txt").write_text("mine")
    before = sorted(workspace.rglob("*"))
    with pytest.raises(UserError, match=said):
        export(**changes)
    assert sorted(workspace.rglob("*")) == before


def test_an_architecture_that_shapes_do_not_tell_is_refused(workspace):
    export()
    samples.write_config(workspace / "config.json", vocab_size=VOCAB_SIZE, num_attention_heads=3)
    with pytest.raises(UserError, match="out: num_attention_heads is 2 in it, 3 in the config"):
        load_model(varied_model(), read_checkpoint("out"), "out")
    for key, value in {"model_type": "roberta", "layer_norm_eps": 1e-5, "is_decoder": True}.items():
        theirs = json.loads((workspace / "out/config.json").read_text())
        (workspace / "changed").mkdir(exist_ok=True)
        (workspace / "changed/config.json").write_text(json.dumps(theirs | {key: value}))
        with pytest.raises(UserError, match=f"changed/config.json: {key} is {value!r}"):
            read_checkpoint("changed")


def test_damaged_folders_are_named(workspace):
    export()
    weights = workspace / "out/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors: not a readable safetensors file"):
        read_checkpoint("out")
    weights.unlink()
    with pytest.raises(UserError, match="out: neither model.safetensors nor pytorch_model.bin in it"):
        read_checkpoint("out")
    (workspace / "out/config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not readable"):
        read_checkpoint("out")
