"""The model against transformers' BertForPreTraining, and packed rows against the same sequences alone."""

import re

import pytest
import torch
import transformers
from torch.testing import assert_close

from common.bert_config import BertConfig
from common.errors import UserError
from modeling import BertForPreTraining, losses
from ops.attention import ATTENTIONS
from tests.support import samples
from tests.support.preparation import ROOT

RENAMED = {"intermediate.dense_act": "intermediate.dense", "pooler.dense_act": "pooler.dense",
           "transform.dense_act": "transform.dense"}


def reference_name(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def reference_model(model: BertForPreTraining) -> transformers.BertForPreTraining:
    """transformers' model with the weights of ours."""
    values = {**vars(model.config), "vocab_size": model.config.padded_vocab_size}
    reference = transformers.BertForPreTraining(transformers.BertConfig(**values, attn_implementation="eager")).eval()
    weights = {reference_name(name): value for name, value in model.state_dict().items()}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    reference.load_state_dict(weights)
    return reference


def reference_output(reference, batch):
    labels = torch.full(batch["input_ids"].shape, -100)
    for row, (positions, ids) in enumerate(zip(batch["masked_lm_positions"], batch["masked_lm_ids"], strict=True)):
        labels[row, positions[positions > 0].long()] = ids[positions > 0].long()
    return reference(input_ids=batch["input_ids"].long(), attention_mask=batch["input_mask"].long(),
                     token_type_ids=batch["segment_ids"].long(), labels=labels,
                     next_sentence_label=batch["next_sentence_labels"].long().flatten())


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = BertForPreTraining(samples.config(initializer_range=0.2)).eval()
    with torch.no_grad():  # biases and LayerNorms of their own, so that a swapped or missing one shows
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_logits_losses_and_gradients_equal_transformers(model, attention):
    if attention != "sdpa":
        weights = model.state_dict()
        model = BertForPreTraining(model.config, attention).eval()
        model.load_state_dict(weights)
    batch = samples.unpacked_batch([24, 5, 11, 17, 8])
    reference = reference_model(model)
    expected = reference_output(reference, batch)
    mlm_logits, nsp_logits = model.logits(batch)
    used = batch["masked_lm_positions"] > 0
    rows = torch.arange(5)[:, None].expand_as(used)[used]
    expected_mlm_logits = expected.prediction_logits[rows, batch["masked_lm_positions"][used].long()]
    assert_close(mlm_logits[used], expected_mlm_logits, atol=1e-4, rtol=1e-4)
    assert_close(nsp_logits[:, 0], expected.seq_relationship_logits, atol=1e-4, rtol=1e-4)

    loss = model(batch)["loss"]
    assert_close(loss, expected.loss, atol=1e-4, rtol=1e-4)
    loss.backward()
    expected.loss.backward()
    gradients = {reference_name(name): parameter.grad for name, parameter in model.named_parameters()}
    expected_gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert set(gradients) <= set(expected_gradients) | {"cls.predictions.bias"}
    for name, gradient in gradients.items():
        reference_gradient = expected_gradients.get(name, expected_gradients.get("cls.predictions.decoder.bias"))
        assert_close(gradient, reference_gradient, atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_packed_sequence_has_the_logits_it_has_alone(model, depth):
    lengths = [5, 9, 6, 24, 7, 8, 13, 10, 12, 5, 6, 7, 8, 9, 11, 5]
    batch = samples.unpacked_batch(lengths)
    groups = [list(range(first, min(first + depth, len(lengths)))) for first in range(0, len(lengths), depth)]
    row_length = max(sum(lengths[member] for member in group) for group in groups) + 3
    packed = samples.packed_batch(batch, groups, row_length)
    alone_mlm, alone_nsp = model.logits(batch)
    packed_mlm, packed_nsp = model.logits(packed)
    slots = batch["masked_lm_ids"].shape[1]
    for row, group in enumerate(groups):
        for place, member in enumerate(group):
            used = batch["masked_lm_positions"][member] > 0
            assert used.any()
            here = packed_mlm[row, place * slots:(place + 1) * slots]
            assert_close(here[used], alone_mlm[member][used], atol=1e-4, rtol=1e-4)
            assert_close(packed_nsp[row, place], alone_nsp[member, 0], atol=1e-4, rtol=1e-4)


def test_packed_loss_and_gradients_equal_unpacked(model):
    lengths = [5, 9, 6, 24, 7, 8, 13]
    batch = samples.unpacked_batch(lengths)
    packed = samples.packed_batch(batch, [[3], [0, 6, 1], [2, 5, 4]], 32)
    results = []
    for form in (batch, packed):
        model.zero_grad()
        output = model(form)
        output["loss"].backward()
        results.append((output, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    (unpacked_output, unpacked_gradients), (packed_output, packed_gradients) = results
    for name in unpacked_output:
        assert_close(packed_output[name], unpacked_output[name], atol=1e-5, rtol=1e-5)
    for name, gradient in unpacked_gradients.items():
        assert_close(packed_gradients[name], gradient, atol=1e-5, rtol=1e-4)


def test_accumulated_micro_batches_equal_one_large_batch(model):
    batch = samples.unpacked_batch([20 + number % 3 for number in range(40)])  # 3 masked tokens each
    assert len({int((row > 0).sum()) for row in batch["masked_lm_positions"]}) == 1
    model(batch)["loss"].backward()
    whole = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for first in range(0, 40, 2):
        loss = model({key: value[first:first + 2] for key, value in batch.items()})["loss"]
        (loss / 20).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-4)


def test_checkpointed_activations_change_no_gradient():
    batch = samples.unpacked_batch([24, 5, 11])
    gradients = []
    for checkpoint_activations in (False, True):
        torch.manual_seed(0)
        model = BertForPreTraining(samples.config(), "plain", checkpoint_activations).train()
        torch.manual_seed(1)  # dropout
        model(batch)["loss"].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_batch_without_labels_has_loss_zero(model):
    batch = samples.unpacked_batch([9, 7])
    empty = {key: torch.zeros_like(value) for key, value in batch.items()}
    output = model(empty)
    output["loss"].backward()
    assert output["loss"].item() == 0.0
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_empty_slots_and_rows_do_not_count():
    torch.manual_seed(0)
    mlm_logits, nsp_logits = torch.randn(3, 4, 99), torch.randn(3, 1, 2)
    batch = {"masked_lm_positions": torch.tensor([[2, 5, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
             "masked_lm_ids": torch.tensor([[7, 8, 9, 9], [3, 9, 9, 9], [9, 9, 9, 9]]),
             "next_sentence_labels": torch.tensor([[1], [0], [1]]),
             "next_sentence_weights": torch.tensor([[1], [1], [0]])}
    log_p = mlm_logits.log_softmax(-1)
    by_hand = -(log_p[0, 0, 7] + log_p[0, 1, 8] + log_p[1, 0, 3]) / 3
    assert_close(losses(mlm_logits, nsp_logits, batch)["mlm_loss"], by_hand)
    log_p = nsp_logits.log_softmax(-1)
    assert_close(losses(mlm_logits, nsp_logits, batch)["nsp_loss"], -(log_p[0, 0, 1] + log_p[1, 0, 0]) / 2)


def test_weights_start_as_the_paper_says():
    torch.manual_seed(0)
    model = BertForPreTraining(samples.config(initializer_range=0.05))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert (parameter == 1).all(), name
        else:
            assert 0.035 < parameter.std() < 0.065, name


def test_vocabulary_is_padded_to_a_multiple_of_eight_and_the_decoder_tied():
    model = BertForPreTraining(samples.config(vocab_size=99))
    assert model.bert.embeddings.word_embeddings.weight.shape[0] == 104
    model.to_device(torch.device("cpu"))
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight


@pytest.mark.parametrize("changes, said", [
    ({"hidden_size": 25}, "hidden_size 25 is not divisible by num_attention_heads 3"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"), ({"hidden_size": "24"}, "hidden_size is '24'"),
    ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"), ({"hidden_act": "step"}, "hidden_act is 'step'"),
    ({"initializer_range": -1}, "initializer_range is -1"), ({"rotary_dim": 32}, "unknown key 'rotary_dim': 32"),
    ({"vocab_size": True}, "vocab_size is True"), ({"type_vocab_size": 1}, "type_vocab_size is 1"),
])
def test_impossible_configs_are_named(tmp_path, changes, said):
    path = samples.write_config(tmp_path / "config.json", **changes)
    with pytest.raises(UserError) as error:
        BertConfig.from_json_file(path)
    assert said in str(error.value) and str(path) in str(error.value)


GOOGLE = {"directionality": "bidi", "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3,
          "pooler_size_per_head": 128, "pooler_type": "first_token_transform"}
SENTENCES = {  # as of a sentence encoder that transformers 2 wrote
    "_num_labels": 2, "architectures": None, "finetuning_task": None, "num_beams": 1, "pruned_heads": {}, "top_k": 50,
    "is_decoder": False, "output_past": True, "use_bfloat16": False, "torchscript": False, "attend_backwards": False}
TRANSFORMERS = {"architectures": ["BertForPreTraining"], "model_type": "bert", "layer_norm_eps": 1e-12,
                "pad_token_id": 0, "position_embedding_type": "absolute", "transformers_version": "4.5.0",
                "torch_dtype": "float32", "use_cache": True, "classifier_dropout": None}
DEFAULTS = {key: value for key, value in transformers.BertConfig().to_dict().items() if key not in samples.TINY}


@pytest.mark.parametrize("further", [GOOGLE, SENTENCES, TRANSFORMERS, DEFAULTS],
                         ids=["google", "sentences", "transformers", "defaults"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_published_configs_are_taken(tmp_path, further, mark):
    own = samples.write_config(tmp_path / "own.json")
    path = samples.write_config(tmp_path / "config.json", **further)
    path.write_text(mark + path.read_text().replace("\n", "\r\n"), encoding="utf-8")
    assert BertConfig.from_json_file(path) == BertConfig.from_json_file(own)


@pytest.mark.parametrize("key, value", [("layer_norm_eps", 1e-5), ("position_embedding_type", "relative_key"),
                                        ("is_decoder", True), ("directionality", "left"), ("model_type", "roberta"),
                                        ("pruned_heads", {"1": [0]})])
def test_a_published_config_of_another_architecture_is_refused(tmp_path, key, value):
    path = samples.write_config(tmp_path / "config.json", **{key: value})
    with pytest.raises(UserError, match=re.escape(f"{key} is {value!r}, but only")):
        BertConfig.from_json_file(path)


SHIPPED = {  # layers, width, heads, millions of parameters
    "": (24, 1024, 16, 336.2), "_1.2B": (40, 1536, 16, 1185.7),  # Devlin et al. 2018; the reference's large one
    "_base": (12, 768, 12, 110.1), "_small": (4, 512, 8, 29.1), "_mini": (4, 256, 4, 11.3)}  # Turc et al. 2019


@pytest.mark.parametrize("path", sorted(ROOT.glob("bert_config*.json")), ids=lambda path: path.name)
def test_shipped_configs_are_those_of_the_papers(path):
    config = BertConfig.from_json_file(path)
    layers, width, heads, millions = SHIPPED[path.stem.removeprefix("bert_config")]
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (layers, width, heads)
    assert config.intermediate_size == 4 * width and config.vocab_size == 30522 and config.hidden_act == "gelu"
    with torch.device("meta"):
        model = BertForPreTraining(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 1) == millions
