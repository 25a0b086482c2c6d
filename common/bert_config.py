"""The architecture of a BERT, as config files say it, with the sizes and FLOPs that follow from it.  No torch here."""

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

from common.errors import UserError

ACTIVATION_NAMES = ("gelu", "relu", "silu")
LAYER_NORM_EPS = 1e-12
# What published configs say beside BertConfig: what must agree with this model, and what says nothing about it.
AGREEING = {"model_type": "bert", "layer_norm_eps": LAYER_NORM_EPS, "position_embedding_type": "absolute",
            "is_decoder": False, "is_encoder_decoder": False, "add_cross_attention": False,
            "cross_attention_hidden_size": None, "tie_encoder_decoder": False, "tie_word_embeddings": True,
            "pruned_heads": {}, "quantization_config": None, "directionality": "bidi",
            "pooler_type": "first_token_transform"}
SILENT = {  # of configs of Google, and of transformers since version 2 with its settings for generating text
    "architectures", "auto_map", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "classifier_dropout", "decoder_start_token_id", "diversity_penalty", "do_lower_case", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "eos_token_id", "eos_token_ids",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "label2id", "language", "length_penalty", "max_length", "min_length", "name",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_past", "output_scores", "pad_token_id", "pooler_fc_size",
    "pooler_num_attention_heads", "pooler_num_fc_layers", "pooler_size_per_head", "prefix", "problem_type",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tokenizer_class", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers_version", "typical_p", "use_bfloat16", "use_cache", "xla_device"}
MAX_LAYERS = 10_000  # beyond any BERT; building them would take minutes
INTEGER_KEYS = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
                "num_hidden_layers", "type_vocab_size", "vocab_size")


@dataclass(frozen=True)
class BertConfig:
    """The architecture, with the sizes and FLOPs that follow from it.  The values are in bert_config*.json only."""

    attention_probs_dropout_prob: float
    hidden_act: str
    hidden_dropout_prob: float
    hidden_size: int
    initializer_range: float
    intermediate_size: int
    max_position_embeddings: int
    num_attention_heads: int
    num_hidden_layers: int
    type_vocab_size: int
    vocab_size: int

    @classmethod
    def from_json_file(cls, path) -> "BertConfig":
        """Read and check a config; UserError names the file, the key and the impossible value."""
        try:
            values = json.loads(Path(path).read_bytes())  # UTF-8 or UTF-16, with or without a byte order mark
        except OSError as error:
            raise UserError(f"--config_file {path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # not JSON, not text, endless digits or nesting
            raise UserError(f"--config_file {path}: not JSON: {error}") from None
        return cls.from_values(values, f"--config_file {path}")

    @classmethod
    def from_values(cls, values, what: str) -> "BertConfig":
        """The config that the keys of a file give; UserError, with `what`, where they are not those of one."""
        if not isinstance(values, dict):
            raise UserError(f"{what}: holds no JSON object")
        names = {field.name for field in fields(cls)}
        disagreeing = disagreement(values)
        if disagreeing:
            raise UserError(f"{what}: {disagreeing}")
        values = {key: value for key, value in values.items() if key in names or not says_nothing(key, value)}
        if set(values) != names:
            wrong = [f"unknown key {key!r}: {repr(values[key])[:50]}" for key in sorted(set(values) - names)]
            wrong += [f"missing key {key!r}" for key in sorted(names - set(values))]
            raise UserError(f"{what}: {', '.join(wrong)}")
        problem = config_problem(values)
        if problem:
            raise UserError(f"{what}: {problem}")
        config = cls(**values)
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if 4 * config.parameters > memory:
            raise UserError(f"{what}: its {config.parameters / 1e9:.1f} billion parameters take "
                            f"{4 * config.parameters / 2**30:.1f} GiB, this machine has {memory / 2**30:.1f} GiB")
        return config

    @property
    def parameters(self) -> int:
        """Number of weights of a BertForPreTraining."""
        hidden, inner = self.hidden_size, self.intermediate_size
        embeddings = (self.padded_vocab_size + self.max_position_embeddings + self.type_vocab_size + 2) * hidden
        layer = 4 * (hidden + 1) * hidden + (hidden + 1) * inner + (inner + 1) * hidden + 4 * hidden
        heads = 2 * (hidden + 1) * hidden + 2 * hidden + self.padded_vocab_size + 2 * (hidden + 1)
        return embeddings + self.num_hidden_layers * layer + heads

    def training_flops(self, tokens: float, pairs: float, masked_tokens: int) -> float:
        """FLOPs of forward and backward on real tokens, pairs of tokens of one sequence, and masked tokens.

        6 for each weight that a token meets in a matrix product: 2 forward, 4 backward (Kaplan et al. 2020, arXiv
        2001.08361, section 2.1); 12·layers·hidden_size for each pair (Chowdhery et al. 2022, arXiv 2204.02311,
        appendix B).
        """
        hidden, layers = self.hidden_size, self.num_hidden_layers
        layer_weights = 4 * hidden**2 + 2 * hidden * self.intermediate_size
        head_weights = hidden**2 + hidden * self.padded_vocab_size  # of the MLM head
        return 6 * layers * layer_weights * tokens + 12 * layers * hidden * pairs + 6 * head_weights * masked_tokens

    @property
    def padded_vocab_size(self) -> int:
        """vocab_size rounded up to a multiple of 8, for matrix units; labels are never the added entries."""
        return -(-self.vocab_size // 8) * 8


def says_nothing(key: str, value) -> bool:
    """Whether a key that is none of BertConfig's leaves the model as it is: known to, private, or without a value."""
    return key in AGREEING or key in SILENT or key.startswith("_") or value in (None, False, "", [], {})


def disagreement(values: dict) -> str | None:
    """The first key of a published config that says another architecture than this one, or None."""
    for key, value in AGREEING.items():
        if values.get(key, value) != value:
            return f"{key} is {values[key]!r}, but only {value!r} is supported"
    return None


def config_problem(values: dict) -> str | None:
    """The first impossible value of a config, or None."""
    for key in INTEGER_KEYS:
        largest = MAX_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if type(values[key]) is not int or not 1 <= values[key] <= largest:
            return f"{key} is {repr(values[key])[:50]}, not a whole number from 1 to {largest}"
    for key in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        if type(values[key]) not in (int, float) or not 0.0 <= values[key] < 1.0:
            return f"{key} is {values[key]!r}, not a number from 0 to below 1"
    if type(values["initializer_range"]) not in (int, float) or not 0.0 < values["initializer_range"] < 1e3:
        return f"initializer_range is {values['initializer_range']!r}, not a number above 0 and below 1000"
    if not isinstance(values["hidden_act"], str) or values["hidden_act"] not in ACTIVATION_NAMES:
        return f"hidden_act is {values['hidden_act']!r}, not one of {', '.join(ACTIVATION_NAMES)}"
    if values["hidden_size"] % values["num_attention_heads"]:
        return (f"hidden_size {values['hidden_size']} is not divisible by "
                f"num_attention_heads {values['num_attention_heads']}")
    if values["type_vocab_size"] < 2:
        return f"type_vocab_size is {values['type_vocab_size']}, but segment_ids hold 0 and 1"
    return None
