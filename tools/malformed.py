"""Malformed inputs for tools/fuzz.py, as strategies of Hypothesis that draw the bytes of one file.

Each kind of input has a sound file, which a training accepts.  Drawn is that file with bytes removed, flipped or
inserted, or with its contents changed and written in the same format: a missing key, a value of another type, a wrong
shape.  Some changes leave the input valid.
"""

import io
import json
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file

from checkpoint import optimizer_shards
from checkpoint.file import write_file
from data.masking import MaskingRule
from data.shards import write_shard
from tests.support import samples, synthetic
from tools import malformed_pickles
from tools.malformed_values import OPS, changed, edited, json_texts, op_lists, values

LENGTH, PREDICTIONS, VOCABULARY = 24, 4, 99
RULE = MaskingRule(0.15, PREDICTIONS, VOCABULARY, (0, 1, 2, 3, 4))
INDEX, WEIGHTS = "sharded/ckpt_1.optim/index.json", "theirs/model.safetensors"


@dataclass(frozen=True)
class Kind:
    """One kind of input: the file that is replaced, the flags that use it, sound contents, and damaged contents."""

    name: str
    file: str
    flags: dict
    sound: bytes
    contents: st.SearchStrategy[bytes]


def kinds(folder: Path) -> list[Kind]:
    """Write sound inputs to a folder, and describe how each is damaged."""
    write_sound_data(folder)
    write_checkpoints(folder)
    config, metadata, index, theirs, a_shard, packed_shard, without_masks, a_checkpoint, weights = (
        (folder / name).read_bytes() for name in (
            "config.json", "packed_metadata.json", INDEX, "theirs/config.json", "data/a_training.hdf5", "packed/a.hdf5",
            "without_masks/a_training.hdf5", "out/ckpt_1.pt", WEIGHTS))
    checkpoints, resume = checkpoint_files(a_checkpoint, folder / "drawn.pt"), {"resume_from_checkpoint": True}
    start = {"init_checkpoint": "start.pt"} | resume
    return [
        Kind("config", "config.json", {}, config, json_texts(config)),
        Kind("op list", "ops.txt", {"hmp": True, "hmp_bf16": "ops.txt"}, OPS, op_lists()),
        Kind("metadata", "packed_metadata.json", {"input_dir": "packed"}, metadata, json_texts(metadata)),
        Kind("unpacked shard", "data/b_training.hdf5", {}, a_shard, shard_files(a_shard)),
        Kind("packed shard", "packed/b.hdf5", {"input_dir": "packed"}, packed_shard, shard_files(packed_shard)),
        Kind("shard without masks", "without_masks/b_training.hdf5", {"input_dir": "without_masks"}, without_masks,
             st.one_of(shard_files(without_masks), with_other_attributes(without_masks))),
        Kind("checkpoint to resume", "out/ckpt_1.pt", {"output_dir": "out"} | resume, a_checkpoint, checkpoints),
        Kind("checkpoint to start from", "start.pt", start, a_checkpoint, checkpoints),
        Kind("index of sharded state", INDEX, {"output_dir": "sharded"} | resume, index, json_texts(index)),
        Kind("weights of transformers", WEIGHTS, {"init_checkpoint": "theirs"}, weights, changed(weights)),
        Kind("config of transformers", "theirs/config.json", {"init_checkpoint": "theirs"}, theirs, json_texts(theirs)),
        *pickles(folder, a_checkpoint, start, resume),
    ]


def pickles(folder: Path, a_checkpoint: bytes, start: dict, resume: dict) -> list[Kind]:
    """Hostile pickles in files of torch.save, without our checksum."""
    state = torch.load(io.BytesIO(a_checkpoint), weights_only=True)
    del state["checksum"]
    zipped, legacy = saved(state), malformed_pickles.saved_before_1_6(state)
    shutil.copytree(folder / "theirs", folder / "older")
    theirs = saved(load_file(folder / "older/model.safetensors"))
    (folder / "older/model.safetensors").unlink()
    return [
        Kind("pickle to resume", "out/ckpt_1.pt", {"output_dir": "out"} | resume, zipped,
             malformed_pickles.zip_files(zipped)),
        Kind("pickle before 1.6", "start.pt", start, legacy, malformed_pickles.legacy_files(legacy)),
        Kind("pickle of transformers", "older/pytorch_model.bin", {"init_checkpoint": "older"}, theirs,
             malformed_pickles.zip_files(theirs)),
    ]


# --- sound inputs ---

def write_sound_data(folder: Path) -> None:
    """A config with a small vocabulary, two shards of each form, and metadata."""
    samples.write_config(folder / "config.json", vocab_size=VOCABULARY)
    for name, seed in (("a", 0), ("b", 1)):
        rng = np.random.default_rng(seed)
        rows = synthetic.unpacked_rows(np.array([24, 5, 11, 13, 8, 17]), rng, LENGTH, PREDICTIONS)
        rows |= {key: rows[key] % VOCABULARY for key in ("input_ids", "masked_lm_ids")}
        write_shard(folder / f"data/{name}_training.hdf5", rows)
        write_shard(folder / f"without_masks/{name}_training.hdf5", rows, RULE, PREDICTIONS)
    batch = samples.unpacked_batch([24, 5, 11, 13, 8, 10])
    packed = samples.packed_batch(batch, [[0], [1, 2], [3, 4], [5]], LENGTH)
    packed |= {key: packed[key] % VOCABULARY for key in ("input_ids", "masked_lm_ids")}
    for name in ("a", "b"):
        write_shard(folder / f"packed/{name}.hdf5", {key: value.numpy() for key, value in packed.items()})
    metadata = {"avg_seq_per_sample": 1.5, "top_8_strategies": [[24]]}
    (folder / "packed_metadata.json").write_text(json.dumps(metadata), encoding="utf-8")


def write_checkpoints(folder: Path) -> None:
    """Untrained weights: a checkpoint of step 1, one with sharded optimizer state, and a Hugging Face model folder."""
    from checkpoint import huggingface
    from common.bert_config import BertConfig
    from lamb import NVLAMB
    from modeling import BertForPreTraining
    from optim.build import parameter_groups

    model = BertForPreTraining(BertConfig.from_json_file(folder / "config.json"))
    optimizer = NVLAMB(parameter_groups(model))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 1, "phase": 1, "rows": 4,
             "config": vars(model.config), "data": {"shards": {"a_training.hdf5": 6, "b_training.hdf5": 6},
                                                    "left_out": {}}, "scaler": {}, "skipped": {"skipped_steps": 0}}
    write_file(folder / "out/ckpt_1.pt", state)
    groups, sharded = optimizer_shards.numbered_groups(optimizer), folder / "sharded/ckpt_1.pt"
    name, facts = optimizer_shards.write_share(folder / "sharded/.tmp/rank_0_of_1.pt", optimizer, groups)
    optimizer_shards.complete(folder / "sharded/.tmp", {name: facts}, sharded)
    write_file(sharded, {**state, "optimizer": {"folder": "ckpt_1.optim", "param_groups": groups}})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(VOCABULARY - 5))]
    huggingface.write_folder(folder / "theirs", model, tokens, True, "", variants=False)


# --- shards ---

def shard_files(sound: bytes) -> st.SearchStrategy[bytes]:
    """A shard with bytes changed, or rewritten with one wrong data set."""
    with h5py.File(io.BytesIO(sound)) as file:
        rows, attributes = {key: file[key][...] for key in file}, dict(file.attrs)
    numbers = st.integers(-2**40, 2**40) | st.sampled_from([-1, 2, 24, 99, 2**31, 2**62])
    spoiled = st.builds(written_anew, st.just(rows), st.just(attributes), st.sampled_from(sorted(rows)),
                        st.sampled_from(SPOILERS), numbers, st.integers(0, 10_000))
    return st.one_of(changed(sound), changed(sound), spoiled)


def with_other_attributes(sound: bytes) -> st.SearchStrategy[bytes]:
    """A shard without masks, with one attribute removed or replaced."""
    with h5py.File(io.BytesIO(sound)) as file:
        names = sorted(file.attrs)
    whole = st.integers(-2**63, 2**63 - 1) | st.integers(-2, VOCABULARY)
    other = st.one_of(st.none(), whole, st.floats(allow_subnormal=False),
                      st.text(st.characters(exclude_categories=["Cs", "Cc"])),
                      st.lists(st.integers(-2, VOCABULARY), max_size=7))
    return st.builds(with_attribute, st.just(sound), st.sampled_from(names), other)


def with_attribute(sound: bytes, name: str, value) -> bytes:
    memory = io.BytesIO(sound)
    with h5py.File(memory, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    return memory.getvalue()


def written_anew(rows: dict, attributes: dict, key: str, spoil, number: int, place: int) -> bytes:
    memory = io.BytesIO()
    with h5py.File(memory, "w") as file:
        file.attrs.update(attributes)
        for name, data in rows.items():
            if name != key:
                file[name] = data
        spoil(file, key, rows[key], number, place)
    return memory.getvalue()


def leave_out(file, key, data, number, place) -> None:
    """Leave the data set out."""


def impossible_value(file, key, data, number, place) -> None:
    data = data.astype(np.int64)
    data.flat[place % data.size] = number
    file[key] = data


def fewer_rows(file, key, data, number, place) -> None:
    file[key] = data[:place % len(data)]


def other_width(file, key, data, number, place) -> None:
    file[key] = np.resize(data, (len(data), place % 50))


def other_rank(file, key, data, number, place) -> None:
    file[key] = data.reshape(-1) if place % 2 else data[..., None]


def floating(file, key, data, number, place) -> None:
    file[key] = data.astype(np.float32) * number


def texts(file, key, data, number, place) -> None:
    file[key] = np.full(data.shape, b"text", dtype="S4")


def one_number(file, key, data, number, place) -> None:
    file[key] = place


def nothing(file, key, data, number, place) -> None:
    file[key] = h5py.Empty("i4")


def group(file, key, data, number, place) -> None:
    file.create_group(key)


def link(file, key, data, number, place) -> None:
    file[key] = h5py.SoftLink("/nowhere") if place % 2 else h5py.ExternalLink("nowhere.hdf5", "/x")


def ragged(file, key, data, number, place) -> None:
    file.create_dataset(key, (len(data),), h5py.vlen_dtype(np.int32))


def promises(file, key, data, number, place) -> None:
    """Declare more rows than the file holds."""
    file.create_dataset(key, (abs(number) + 1, *data.shape[1:]), data.dtype, chunks=(1, *data.shape[1:]))


def unsigned(file, key, data, number, place) -> None:
    file[key] = data.astype(np.uint64) + np.uint64(place % 2 * 2**63)


SPOILERS = (leave_out, impossible_value, impossible_value, fewer_rows, other_width, other_rank, floating, texts,
            one_number, nothing, group, link, ragged, promises, unsigned)


# --- checkpoints ---

TENSORS = (torch.zeros(0), torch.zeros(3, 5), torch.tensor(7.0), torch.tensor(3), torch.full((24,), float("nan")),
           torch.zeros(24, dtype=torch.complex64), torch.zeros(24, dtype=torch.bool), torch.eye(3).to_sparse(),
           torch.zeros(24, dtype=torch.float64), torch.zeros(24, dtype=torch.bfloat16), torch.ones(24, 1).expand(24, 9))


class Payload:
    """Creates the marker if a malicious pickle is executed."""

    def __reduce__(self):
        return open, (malformed_pickles.MARKER, "w")


def checkpoint_files(sound: bytes, drawn: Path) -> st.SearchStrategy[bytes]:
    """A checkpoint with bytes changed, or rewritten with other contents, with and without our checksum."""
    state = torch.load(io.BytesIO(sound), weights_only=True)
    state = edited({**state, "model": dict(state["model"])}, values | st.sampled_from(TENSORS))
    contents = state | values
    sealed = state.map(lambda value: sealed_file(drawn, value))
    pickles = (values | st.builds(Payload)).map(lambda value: pickle.dumps({"model": value}))
    return st.one_of(changed(sound), sealed, contents.map(saved), pickles,
                     st.builds(Payload).map(lambda value: saved({"model": value})))


def saved(value) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def sealed_file(path: Path, state: dict) -> bytes:
    write_file(path, state)
    return path.read_bytes()
