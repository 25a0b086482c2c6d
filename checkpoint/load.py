"""The weights and moments of a checkpoint, checked and copied into a model and an optimizer."""

from dataclasses import fields

import torch

from checkpoint import huggingface, optimizer_shards
from checkpoint.file import check_tensor, is_plain, kind_of
from checkpoint.pickle_reader import printable
from common.bert_config import BertConfig
from common.errors import UserError, whole_number
from optim.build import local_optimizer

NSP_PARTS = ("bert.pooler.", "cls.seq_relationship.")
FREE_TO_DIFFER = ("attention_probs_dropout_prob", "hidden_dropout_prob", "initializer_range")  # of training only


def holds_nsp(contents: dict) -> bool:
    """Whether a checkpoint has weights of the next-sentence head or its pooler: those of --no_nsp have neither."""
    return any(part in str(name) for name in contents["model"] for part in NSP_PARTS)


def without_nsp(contents: dict) -> dict:
    """The contents for a model without next sentence prediction."""
    kept = {name: value for name, value in contents["model"].items()
            if not any(part in str(name) for part in NSP_PARTS)}
    fresh = {huggingface.FRESH: tuple(part for part in contents[huggingface.FRESH] if part not in NSP_PARTS)} \
        if huggingface.FRESH in contents else {}
    return {**contents, "model": kept, **fresh}


def load_model(model, contents: dict, path) -> None:
    """Load weights by name.  Word embeddings of the unpadded vocabulary are padded with zeros first.

    The parts that a Hugging Face folder does not hold stay as they are; it must hold nothing else.
    """
    check_architecture(model.config, contents, path)
    expected = model.state_dict()
    given = {str(name).removeprefix("_orig_mod.").removeprefix("module."): value
             for name, value in contents["model"].items()}
    unknown = sorted(set(given) - set(expected)) if huggingface.FRESH in contents else []
    if unknown:
        raise UserError(f"{path}: holds {printable(unknown[0])}, which neither BertForPreTraining, BertForMaskedLM nor "
                        f"BertModel of this config has ({len(unknown)} weights are unknown)")
    given = {name: padded_to(value, expected[name]) if name in huggingface.OF_VOCABULARY else value
             for name, value in given.items() if name in expected}
    fresh = {name for name in expected if name.startswith(contents.get(huggingface.FRESH, ()))}
    missing = sorted(set(expected) - set(given) - fresh)
    if missing:
        raise UserError(f"{path}: no weight {missing[0]} in it ({len(missing)} of {len(expected)} missing)")
    for name, value in given.items():
        check_tensor(value, expected[name].shape, f"{path}: {name}")
    for name, parameter in model.state_dict(keep_vars=True).items():
        if name not in given:
            continue
        # A copy onto the device, not into its memory, which on lazy devices is an operation that can run on the host.
        parameter.data = given[name].to(parameter.device, parameter.dtype, copy=True).contiguous()


def config_of(contents: dict, path, config_file: str | None, least_vocab_size: int = 0) -> BertConfig:
    """The architecture of a checkpoint's contents, from `config_file` where one is given, else as they say.

    A `config_file` whose vocab_size is below the least, that of the data, takes that of the contents.  UserError where
    the two disagree, and where neither says it.
    """
    saved = contents.get("config")
    if config_file:
        config = BertConfig.from_json_file(config_file)
        if config.vocab_size < least_vocab_size and isinstance(saved, dict) and "vocab_size" in saved:
            config = BertConfig.from_values({**vars(config), "vocab_size": saved["vocab_size"]}, f"{path}: config")
        check_architecture(config, contents, path)
        return config
    if not isinstance(saved, dict):
        raise UserError(f"{path}: does not say which model it is of: give its --config_file")
    return BertConfig.from_values({field.name: saved[field.name] for field in fields(BertConfig)
                                   if field.name in saved}, f"{path}: config")


def check_architecture(config, contents: dict, path) -> None:
    """UserError where a checkpoint has another architecture, even one with the same shapes (heads, activation)."""
    saved = contents.get("config")
    for key, own in vars(config).items():
        value = saved.get(key, own) if isinstance(saved, dict) else own
        if isinstance(value, int | float | str) and value != own and key not in FREE_TO_DIFFER:
            raise UserError(f"{path}: {key} is {repr(value)[:50]} in it, {own!r} in the config")


def padded_to(value, expected: torch.Tensor):
    """`value` with zero rows added where only the padding of the vocabulary (less than 8 rows) is missing."""
    if not is_plain(value) or value.dim() != expected.dim() or value.dim() == 0:
        return value
    missing = expected.shape[0] - value.shape[0]
    if 0 < missing < 8 and value.shape[1:] == expected.shape[1:]:
        return torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value


def load_master_weights(optimizer, masters, path) -> None:
    """Load the fp32 weights that a run in fp16 kept beside the model's: by the optimizer's numbers, as load_optimizer.

    The model must hold the weights of the same checkpoint.  UserError where these are not `masters` rounded to fp16.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(masters, list) or len(masters) != len(parameters):
        raise UserError(f"{path}: its master params are no list of {len(parameters)} weights")
    given = [padded_to(master, parameter) for master, parameter in zip(masters, parameters, strict=True)]
    for number, (master, parameter) in enumerate(zip(given, parameters, strict=True)):
        check_tensor(master, parameter.shape, f"{path}: master params, {number},")
        if not torch.allclose(master.float(), parameter.detach().cpu().float(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise UserError(f"{path}: master params, {number}, is not the model's weight of this number")
    for master, parameter in zip(given, parameters, strict=True):
        parameter.data = master.to(parameter.device, parameter.dtype, copy=True).contiguous()


def load_optimizer(optimizer, state: dict, path) -> None:
    """Load the step count and the moments of this rank's share; rate, decay and betas stay those of this run.

    `state` is NVLAMB's state_dict, with the moments by parameter number, or it names the folder of sharded moments.
    """
    groups = groups_of(state, path)
    if len(groups) != len(optimizer.param_groups):
        raise UserError(f"{path}: its optimizer has {len(groups)} param_groups, not {len(optimizer.param_groups)}")
    local = local_optimizer(optimizer)
    share = {parameter for group in local.param_groups for parameter in group["params"]}
    numbered = []
    for group, own in zip(groups, optimizer.param_groups, strict=True):
        numbers = group.get("params")
        if not isinstance(numbers, list) or [type(number) for number in numbers] != [int] * len(own["params"]):
            raise UserError(f"{path}: its optimizer has another group than the {len(own['params'])} parameters "
                            f"with weight decay {own['weight_decay']}")
        numbered += [pair for pair in zip(numbers, own["params"], strict=True) if pair[1] in share]
        step = group.get("step", 0)
        step = step.item() if isinstance(step, torch.Tensor) and step.numel() == 1 else step
        own["step"] = whole_number({"step": step}, "step", f"{path}: optimizer")
    for own, local_group in zip(optimizer.param_groups, local.param_groups, strict=True):
        local_group["step"] = own["step"]
    moments = optimizer_shards.read_moments(path, state, [number for number, _ in numbered])
    for number, parameter in numbered:
        local.state[parameter] = moments_for(parameter, moments.get(number), f"{path}: optimizer, {number}")


def groups_of(state, path) -> list[dict]:
    """The param_groups of an optimizer's state_dict."""
    groups = state.get("param_groups") if isinstance(state, dict) else None
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        raise UserError(f"{path}: its optimizer does not hold param_groups (it is {kind_of(state)}); --init_checkpoint "
                        f"takes the weights alone")
    return groups


def moments_for(parameter, given, what: str) -> dict[str, torch.Tensor]:
    """Both moments of a parameter, checked, on its device and in its type; none where none were saved."""
    moments = {}
    for key in ("exp_avg", "exp_avg_sq") if given is not None else ():
        value = padded_to(given.get(key) if isinstance(given, dict) else None, parameter)
        check_tensor(value, parameter.shape, f"{what}, {key},")
        moments[key] = value.to(parameter.device, parameter.dtype, copy=True).contiguous()
    return moments
