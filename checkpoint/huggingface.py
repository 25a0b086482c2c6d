"""Hugging Face model folders: writes the weights of this code's BERT to one, and reads them from one.

    config.json               the architecture
    model.safetensors         all weights, without the padding of the vocabulary: BertForPreTraining, and after a
                              training with --no_nsp BertForMaskedLM
    model.VARIANT.safetensors the weights that one other class uses (VARIANTS)
    vocabulary_padding.safetensors   the rows of the padded vocabulary, which only this code reads
    vocab.txt, tokenizer.json, tokenizer_config.json, special_tokens_map.json   the tokenizer

Only safetensors, tokenizers and torch are needed; transformers is not.
"""

import json
import shutil
import sys
from dataclasses import fields
from itertools import count, islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, processors

from checkpoint.file import is_plain, kind_of, read_archive
from checkpoint.pickle_reader import printable
from common.bert_config import LAYER_NORM_EPS, BertConfig, disagreement
from common.errors import UserError, first_line
from common.files import replacing_files
from data.tokenizer import (
    SPECIAL_TOKENS,
    TOKENIZER,
    VOCAB_FILE,
    load_vocabulary,
    reference_tokenizer,
    vocabulary_path,
)
from data.vocabulary import VOCABULARY, Vocabulary, is_cased

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"  # where their weights are spread over several files
OLD_WEIGHTS = "pytorch_model.bin"
SETTINGS = "tokenizer_config.json"
PADDING = "vocabulary_padding.safetensors"
# The prefixes of the weights that BertForMaskedLM and BertModel use: transformers 5 warns of each weight not used.
VARIANTS = {"masked_lm": ("bert.embeddings.", "bert.encoder.", "cls.predictions."), "encoder": ("bert.",)}
WORDS, BIAS, DECODER = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias", "cls.predictions.decoder"
OF_VOCABULARY = (WORDS, BIAS, f"{DECODER}.weight")  # a row for each token
NEVER_PREDICTED = -10000.0  # the bias of an added entry of the vocabulary: exp() of its logit is 0
SPECIAL_TOKENS_MAP = {f"{token.strip('[]').lower()}_token": token for token in SPECIAL_TOKENS}
FRESH = "fresh_parts"  # key of read_folder: the prefixes of PARTS that the folder does not hold
PARTS = {"bert.pooler.": "pooler", "cls.predictions.": "masked-LM head", "cls.seq_relationship.": "next-sentence head"}
ENCODER = ("embeddings.", "encoder.", "pooler.")  # what a BertModel saved alone calls bert.embeddings. and so on
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # constants that transformers 2 to 4 saved


def to_ours(name: str) -> str:
    """Our name, from that in transformers, with or without "bert.", or in the TensorFlow checkpoints before it (gamma,
    beta).

        >>> to_ours("encoder.layer.0.intermediate.dense.weight")
        'bert.encoder.layer.0.intermediate.dense_act.weight'
    """
    name = f"bert.{name}" if name.startswith(ENCODER) else name
    for module in ("intermediate", "pooler", "transform"):
        name = name.replace(f"{module}.dense.", f"{module}.dense_act.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


# --- writing ---

def write_folder(folder, model, tokens: list[str], lower_case: bool, card: str, variants: bool = True) -> None:
    """Write the folder.  All its files get their names at the end, or none does."""
    from safetensors.torch import save_file

    config = {"architectures": [class_name(model)], "model_type": "bert", **vars(model.config),
              "layer_norm_eps": LAYER_NORM_EPS, "pad_token_id": tokens.index("[PAD]"), "tie_word_embeddings": True,
              "dtype": "float32"}
    tokenizer_config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower_case, "strip_accents": None,
                        "tokenize_chinese_chars": True, "model_max_length": model.config.max_position_embeddings,
                        **SPECIAL_TOKENS_MAP}
    contents = {
        "config.json": as_json(config),
        VOCAB_FILE: "".join(f"{token}\n" for token in tokens),
        TOKENIZER: tokenizer_of(tokens, lower_case).to_str(pretty=True),
        SETTINGS: as_json(tokenizer_config),
        "special_tokens_map.json": as_json(SPECIAL_TOKENS_MAP),
        "README.md": card,
    }
    tensors = weight_files(model, variants)
    with replacing_files(folder, [*tensors, *contents]) as paths:
        for text, path in zip(contents.values(), paths[len(tensors):], strict=True):
            path.write_text(text, encoding="utf-8", errors="backslashreplace")  # the card names files
        for weights, path in zip(tensors.values(), paths, strict=False):
            save_file(weights, path, metadata={"format": "pt"})
            shutil.copymode(paths[-1], path)  # save_file makes files that nobody else may read


def class_name(model) -> str:
    """The class of transformers that has the weights of this model, all of them and no others."""
    return "BertForPreTraining" if model.has_nsp else "BertForMaskedLM"


def weight_files(model, variants: bool) -> dict[str, dict[str, torch.Tensor]]:
    """File name → tensors by the names in transformers."""
    weights = {name.replace(".dense_act.", ".dense."): value.detach().cpu().contiguous()
               for name, value in model.state_dict().items()
               if not name.startswith(DECODER)}  # shares the word embeddings
    words = model.config.vocab_size
    padding = {name: weights[name][words:].clone() for name in (WORDS, BIAS)}
    weights |= {name: weights[name][:words].clone() for name in (WORDS, BIAS)}
    files = {WEIGHTS: weights}
    for variant, prefixes in VARIANTS.items() if variants else ():
        chosen = {name: value for name, value in weights.items() if name.startswith(prefixes)}
        if len(chosen) < len(weights):  # without NSP, "masked_lm" would be the same file again
            files[f"model.{variant}.safetensors"] = chosen
    if len(padding[BIAS]):
        files[PADDING] = padding
    return files


def fill_up(tokens: list[str], vocab_size: int, what: str) -> list[str]:
    """The tokens of a vocabulary and, where the model has room for a few more, as published ones do, [unusedN]."""
    missing = vocab_size - len(tokens)
    if missing:
        print(f"warning: {what}: {len(tokens)} tokens, but vocab_size in the config is {vocab_size}: the last "
              f"{missing} are named [unusedN]", file=sys.stderr)
    taken = set(tokens)
    free = (name for name in map("[unused{}]".format, count()) if name not in taken)
    return tokens + list(islice(free, missing))


def tokenizer_of(tokens: list[str], lower_case: bool) -> Tokenizer:
    """BERT's tokenizer: [CLS] A [SEP], [CLS] A [SEP] B [SEP]; special tokens are recognized within a text."""
    tokenizer = reference_tokenizer(tokens, lower_case)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")])
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def as_json(value) -> str:
    return json.dumps(value, indent=2) + "\n"


# --- reading ---

def read_folder(folder) -> dict:
    """The weights, under the names of modeling.py, and what else a checkpoint holds: "config" and "vocabulary".

    Beside them FRESH: the parts of a BertForPreTraining that a BertForMaskedLM or a BertModel lacks.  UserError where
    the folder does not hold a BERT that modeling.py can represent.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = {to_ours(name): value for name, value in read_weights(folder).items()}
    weights = {name: value for name, value in weights.items() if name not in BUFFERS}
    if WORDS not in weights:
        raise UserError(f"{folder}: no weight {WORDS} in it, with or without \"bert.\"")
    fresh = tuple(prefix for prefix in PARTS if not any(name.startswith(prefix) for name in weights))
    bias = weights.pop(f"{DECODER}.bias", None)
    if bias is not None:
        weights.setdefault(BIAS, bias)
    for name, dimensions in ((WORDS, 2), (BIAS, 1)):
        if name in weights and (not is_plain(weights[name]) or weights[name].dim() != dimensions):
            raise UserError(f"{folder}: {name} is no tensor of floating-point numbers with {dimensions} dimensions")
    decoder = weights.pop(f"{DECODER}.weight", None)
    if decoder is not None and not torch.equal(decoder, weights[WORDS]):
        raise UserError(f"{folder}: {DECODER}.weight differs from the word embedding; this code shares the two")
    if "cls.predictions." in fresh:
        weights[BIAS] = weights[WORDS].new_zeros(len(weights[WORDS]))  # as it would begin, but for the padding
    add_padding(folder, weights)
    weights[f"{DECODER}.weight"] = weights[WORDS]
    return {"model": weights, "config": config, VOCABULARY: read_vocabulary(folder), FRESH: fresh}


def fresh_parts(contents: dict) -> str:
    """In words, which parts of the model a folder that was read lacks; "" where none."""
    names = [PARTS[prefix] for prefix in contents.get(FRESH, ())]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def add_padding(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Pad the vocabulary to BertConfig.padded_vocab_size: with the exported rows, else with never predicted ones."""
    words = weights[WORDS]
    missing = -len(words) % 8
    stored = read_tensors(folder / PADDING) if (folder / PADDING).is_file() else {}
    added = {WORDS: words.new_zeros(missing, *words.shape[1:])}
    if BIAS in weights:
        added[BIAS] = weights[BIAS].new_full((missing,), NEVER_PREDICTED)
    for name, rows in added.items():
        padding = stored.get(name, rows)
        if padding.shape != rows.shape:
            raise UserError(f"{folder / PADDING}: {name} has shape {tuple(padding.shape)}, not {tuple(rows.shape)}")
        weights[name] = torch.cat([weights[name], padding])


def read_config(folder: Path) -> dict:
    """The values of config.json that BertConfig has."""
    path = folder / "config.json"
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise UserError(f"{folder}: a folder without config.json is not a Hugging Face model") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not readable: {error}") from None
    disagreeing = disagreement(values)
    if disagreeing:
        raise UserError(f"{path}: {disagreeing}")
    return {field.name: values[field.name] for field in fields(BertConfig) if field.name in values}


def read_vocabulary(folder: Path) -> dict:
    """The vocabulary as in a checkpoint (data.vocabulary.Vocabulary); {} where there is none that can be read.

    transformers writes vocab.txt or, from version 5 on, tokenizer.json alone.
    """
    try:
        settings, tokenizer = (read_settings(folder / name) for name in (SETTINGS, TOKENIZER))
        if not vocabulary_path(folder).is_file():
            return {}
        tokens = load_vocabulary(folder)
        lower_case = settings.get("do_lower_case", (tokenizer.get("normalizer") or {}).get("lowercase"))
        unsaid = False if is_cased(tokens) else None
        return Vocabulary.of(tokens, lower_case if isinstance(lower_case, bool) else unsaid).to_dict()
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        print(f"warning: {folder}: its vocabulary cannot be read: {first_line(error)}", file=sys.stderr)
        return {}


def read_settings(path: Path) -> dict:
    """The values of a JSON file; none where there is no such file."""
    return dict(json.loads(path.read_text(encoding="utf-8-sig"))) if path.is_file() else {}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder, under the names in transformers."""
    if (folder / WEIGHTS).is_file():
        return read_tensors(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{folder / INDEX}: not readable: {error!r}") from None
        return {name: value for file in sorted(names) for name, value in read_tensors(folder / Path(file).name).items()}
    if (folder / OLD_WEIGHTS).is_file():
        return only_tensors(read_archive(folder / OLD_WEIGHTS), folder / OLD_WEIGHTS)
    raise UserError(f"{folder}: neither {WEIGHTS} nor {OLD_WEIGHTS} in it (TensorFlow's and Flax's are not read)")


def only_tensors(weights, path: Path) -> dict[str, torch.Tensor]:
    """The weights that a PyTorch file holds.  UserError where anything else has the name of one."""
    if not isinstance(weights, dict):
        raise UserError(f"{path}: holds {kind_of(weights)}, not a dictionary of weights")
    tensors = {name: value for name, value in weights.items()
               if isinstance(name, str) and isinstance(value, torch.Tensor)}
    for name, value in weights.items():
        if name not in tensors and isinstance(name, str) and to_ours(name).startswith(("bert.", "cls.")):
            raise UserError(f"{path}: {printable(name)} is {kind_of(value)}, no weight")
    return tensors


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from None
