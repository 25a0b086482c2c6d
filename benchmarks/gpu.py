"""BERT-Large on one GPU: every variant of the training step checked, timed, and set beside transformers and the limits.

Batches are sequences of the lengths that English Wikipedia has: a row each at 128 tokens, packed at 512 by this
repository's packer; transformers, which does not know packed rows, gets the same number of unpacked rows (where
it is not installed, the others are measured alone).  Timed is forward and backward of one micro-batch with dropout,
then one LAMB step.  Before, each variant trains two layers for 20 steps without dropout; its losses must be as near to
fp32 as three times those of plain operations under autocast.

    python benchmarks/gpu.py [--variants …] [--rows_128 N] [--rows_512 N] [--json]

It runs on a CPU too, with --no_cuda, a small --config_file and small --sizes.
"""

import contextlib
import gc
import io
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from measuring import ROOT, machine, report, spread  # puts the repository's root on the path
from train_step import transformers_loss, transformers_model

# isort: split
from common import cli
from common.errors import first_line

CHECKED_STEPS, MOST_ERROR = 20, 3.0
BYTES_PER_PARAMETER = 44  # that a LAMB step has to move: 4 for the norm, 24 for the moments, 16 for the update


@dataclass(frozen=True)
class Variant:
    """A way to compute the step: arguments of BertForPreTraining, and whether it is compiled, and recorded."""

    model: dict
    compiled: bool = False
    cuda_graphs: bool = False


SDPA, VARLEN = {"attention_name": "sdpa"}, {"attention_name": "varlen"}
VARIANTS = {
    "plain": Variant({"attention_name": "plain"}),
    "sdpa": Variant(SDPA),
    "varlen": Variant(VARLEN),
    "varlen, loss in chunks": Variant({**VARLEN, "loss_chunk": 512}),
    "varlen, recomputed layers": Variant({**VARLEN, "checkpoint_activations": True}),
    "sdpa, compiled": Variant(SDPA, compiled=True),
    "varlen, compiled": Variant(VARLEN, compiled=True),
    "sdpa, compiled, CUDA graphs": Variant(SDPA, compiled=True, cuda_graphs=True),
    "varlen, compiled, CUDA graphs": Variant(VARLEN, compiled=True, cuda_graphs=True),
    "transformers": Variant({}),
    "transformers, compiled": Variant({}, compiled=True),
}


@dataclass
class Bench:
    """What all measurements share."""

    args: object
    device: object
    config: object
    precision: object
    peak: float  # FLOP/s in bf16
    failures: dict = field(default_factory=dict)
    references: dict = field(default_factory=dict)  # row length → losses of plain operations, in fp32 and in bf16


def main(argv=None) -> None:
    args = parse_arguments(argv)
    import torch

    from common.bert_config import BertConfig
    from devices.device import select_device
    from devices.options import PrecisionOptions
    from devices.precision import Precision
    from training.arguments import device_options
    from training.metrics import REPEATS, matmul_peak

    device = select_device(device_options(args))
    torch.manual_seed(0)
    peak = matmul_peak(device.torch_device, torch.bfloat16, device.matmul_size_for_peak, REPEATS, device.synchronize)
    precision = Precision(PrecisionOptions(bf16=True), device)
    bench = Bench(args, device, BertConfig.from_json_file(args.config_file), precision, peak)
    rivals = ["transformers"] if find_spec("transformers") else []
    figures = {"device": device.describe(), "machine": machine(*rivals), "bf16_peak_tflops": peak / 1e12,
               "steps": [figures for length in args.lengths for figures in shape_figures(bench, length)],
               "lamb": lamb_figures(bench) if args.lamb else {}, "failures": bench.failures}
    report(figures, args.json, lines(figures))


def parse_arguments(argv):
    from training.arguments import add_device_choice

    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--config_file", default=str(ROOT / "bert_config.json"), help="the architecture")
    parser.add_argument("--lengths", type=int, nargs="+", choices=(128, 512), default=[128, 512], help="tokens a row")
    parser.add_argument("--rows_128", type=cli.positive_int, default=64, help="rows of 128 tokens a micro-batch")
    parser.add_argument("--rows_512", type=cli.positive_int, default=32, help="rows of 512 tokens a micro-batch")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to measure")
    parser.add_argument("--repeats", type=cli.positive_int, default=20, help="timed repeats of each")
    parser.add_argument("--lamb", type=cli.boolean, default=True, metavar="BOOL", help="time the LAMB step")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device_choice(parser)
    return parser.parse_args(argv)


def shape_figures(bench: Bench, length: int) -> list[dict]:
    """The figures of every variant at one row length."""
    rows = bench.args.rows_128 if length == 128 else bench.args.rows_512
    unpacked, packed = wikipedia_batches(length, rows)
    found = []
    for name in bench.args.variants:
        batch = unpacked if length == 128 or name.startswith("transformers") else packed
        with note_failure(bench, f"{length}: {name}"):
            found.append(variant_figures(bench, name, length, batch))
            say(line_of(found[-1]))
        forget_compiled()
    return found


def forget_compiled() -> None:
    """Give back the memory of models that are not used any more, and of their graphs.

    Other shapes are compiled anew then: else they would share one graph, of shapes that vary.
    """
    import torch

    torch.compiler.reset()
    gc.collect()


@contextlib.contextmanager
def note_failure(bench: Bench, what: str):
    """A block that measures something: where it fails, the reason is kept and the others go on."""
    try:
        yield
    except Exception as error:  # whatever a compiler or a kernel that is not there happens to raise
        bench.failures[what] = f"{type(error).__name__}: {first_line(error)}"
        say(f"{what}: {bench.failures[what]}")


def say(text: str) -> None:
    """On the way: the result goes to the standard output at the end."""
    print(text, file=sys.stderr, flush=True)


def wikipedia_batches(length: int, rows: int) -> tuple[dict, dict]:
    """The same kind of sequences as a batch of unpacked and as one of packed rows."""
    import numpy as np

    from data import dataloader as dataset
    from data.shards import find_shards
    from pack_pretraining_data_pytorch import main as pack
    from packing import wikipedia_histogram
    from tests.support import synthetic

    histogram = wikipedia_histogram()
    sequences = 4 * rows  # more than two in a row are rare: enough to fill the rows once packed
    lengths = np.random.default_rng(0).choice(len(histogram), sequences, p=histogram / histogram.sum())
    predictions = {128: 20, 512: 80}[length]
    with tempfile.TemporaryDirectory() as folder:
        unpacked, packed = Path(folder) / "unpacked", Path(folder) / "packed"
        synthetic.write_unpacked_shard(unpacked / "a_training_0.hdf5", np.minimum(lengths, length), 0, length,
                                       predictions)
        with contextlib.redirect_stdout(io.StringIO()):
            pack([f"--input_dir={unpacked}", f"--output_dir={packed}", f"--max_sequence_length={length}",
                  f"--max_predictions_per_sequence={predictions}", "--disable_progress_bar"])
        return tuple(next(dataset.batches_once(find_shards(form), rows, synthetic.VOCAB_SIZE))
                     for form in (unpacked, packed))


def variant_figures(bench: Bench, name: str, length: int, batch: dict) -> dict:
    """Check a variant, then time it on a batch of the host."""
    import torch

    from data.dataloader import sequences_in
    from training.metrics import batch_flops

    on_device = bench.device.put(batch)
    error = None if name.startswith("transformers") else checked_error(bench, VARIANTS[name], on_device)
    forget_compiled()
    step = step_of(bench, bench.config, name, on_device)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # before the graphs are recorded: to replay them, nothing is allocated
    step(), step()
    seconds = spread(timed(bench, step))
    real_tokens, sequences = int((batch["input_mask"] > 0).sum()), sequences_in(batch)
    flops = batch_flops(bench.config, batch)
    return {"variant": name, "length": length, "packed": batch["next_sentence_weights"].shape[1] > 1,
            "rows": len(batch["input_ids"]), "sequences": sequences, "seconds": seconds,
            "sequences_per_second": sequences / seconds["median"], "tokens_per_second": real_tokens / seconds["median"],
            "fraction_of_peak": flops / seconds["median"] / bench.peak, "error_vs_plain_autocast": error,
            "memory": bench.device.memory().get("max_memory_allocated")}


def timed(bench: Bench, step) -> list[float]:
    """Seconds of each repeat, waiting for the device before and after."""
    seconds = []
    for _ in range(bench.args.repeats):
        bench.device.synchronize()
        began = time.perf_counter()
        step()
        bench.device.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def step_of(bench: Bench, config, name: str, batch: dict):
    """A function that runs forward and backward of one variant."""
    variant = VARIANTS[name]
    if name.startswith("transformers"):

        model = transformers_model(config).to(bench.device.torch_device)
        if variant.compiled:
            model.compile(dynamic=False)
        forward = transformers_loss(model, batch)
    else:
        model = our_model(bench, config, variant)
        forward = loss_of(model, batch)

    def step():
        model.zero_grad()
        with bench.precision.autocast():
            loss = forward()
        bench.precision.backward(loss)
    return step


def loss_of(model, batch: dict):
    return lambda: model(batch)["loss"]


def our_model(bench: Bench, config, variant: Variant, precision=None):
    from modeling import BertForPreTraining
    from training.compilation import compile_model

    precision = precision or bench.precision
    model = BertForPreTraining(config, autocast=precision.autocast, casts_off=precision.casts_off, **variant.model)
    model.to_device(bench.device.torch_device).train()
    if variant.compiled:
        compile_model(bench.device, model, variant.cuda_graphs)
    return model


def checked_error(bench: Bench, variant: Variant, batch: dict) -> float:
    """How far from fp32 the losses of a variant are, in units of those of plain operations under autocast.

    ValueError where that is too far.
    """
    from devices.options import PrecisionOptions
    from devices.precision import Precision

    length = batch["input_ids"].shape[1]
    if length not in bench.references:
        exact = Precision(PrecisionOptions(), bench.device)
        bench.references[length] = [training_losses(bench, VARIANTS["plain"], precision, batch)
                                    for precision in (exact, bench.precision)]
    right, plain = bench.references[length]
    found = training_losses(bench, variant, bench.precision, batch)
    error, plain_error = ((losses - right).abs().mean().item() for losses in (found, plain))
    if not error <= MOST_ERROR * plain_error:
        raise ValueError(f"its losses are off by {error:.1e}, those of plain operations by {plain_error:.1e}")
    return error / plain_error


def training_losses(bench: Bench, variant: Variant, precision, batch: dict):
    """The losses, as a tensor, of LAMB steps on rows of the batch, with two layers of the model and no dropout."""
    import torch

    from lamb import NVLAMB
    from optim.build import parameter_groups

    config = replace(bench.config, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    model = our_model(bench, config, variant, precision)
    optimizer = NVLAMB(parameter_groups(model), lr=2e-3)
    few = {key: values[:8] for key, values in batch.items()}
    losses = []
    for _ in range(CHECKED_STEPS):
        with precision.autocast():
            loss = model(few)["loss"]
        precision.backward(loss)
        precision.step(optimizer)
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses)


def lamb_figures(bench: Bench) -> dict:
    """Seconds of an optimizer step over the whole model, and what share of the memory's bandwidth it uses."""
    import torch

    from lamb import NVLAMB
    from modeling import BertForPreTraining
    from optim.build import parameter_groups
    from optim.fused_lamb import CompiledNVLAMB, MultiTensorNVLAMB

    model = BertForPreTraining(bench.config).to_device(bench.device.torch_device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-4
    parameters = sum(parameter.numel() for parameter in model.parameters())
    bandwidth = copy_bandwidth(bench)
    makers = {"NVLAMB": NVLAMB, "NVLAMB, compiled": partial(CompiledNVLAMB, backend="inductor", in_parts=True),
              "--use_fused_lamb": MultiTensorNVLAMB,
              "AdamW, fused": lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True)}
    found = {"parameters": parameters, "bandwidth": bandwidth,
             "floor_seconds": BYTES_PER_PARAMETER * parameters / bandwidth, "seconds": {}}
    for name, make in makers.items():
        with note_failure(bench, f"LAMB: {name}"):
            optimizer = make(parameter_groups(model), lr=1e-3)
            optimizer.step(), optimizer.step()
            found["seconds"][name] = spread(timed(bench, optimizer.step))
    return found


def copy_bandwidth(bench: Bench) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    import torch

    source = torch.randn(64 << 20, device=bench.device.torch_device)  # 256 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / statistics.median(timed(bench, lambda: target.copy_(source)))


def lines(figures: dict) -> list[str]:
    lamb = figures["lamb"]
    found = [f"{figures['device']}, bf16 peak {figures['bf16_peak_tflops']:.0f} TFLOP/s",
             ", ".join(f"{name} {value}" for name, value in figures["machine"].items()),
             *map(line_of, figures["steps"])]
    if lamb:
        floor = lamb["floor_seconds"]
        found.append(f"one LAMB step over {lamb['parameters'] / 1e6:.0f} million parameters; {BYTES_PER_PARAMETER} "
                     f"bytes each take {1000 * floor:.2f} ms at the {lamb['bandwidth'] / 1e9:.0f} GB/s of a copy")
        found += [f"  {name:20s}{1000 * seconds['median']:8.2f} ms, {seconds['median'] / floor:.2f} of that"
                  for name, seconds in lamb["seconds"].items()]
    return found + [f"failed: {what}: {reason}" for what, reason in figures["failures"].items()]


def line_of(step: dict) -> str:
    seconds, memory = step["seconds"], step["memory"]
    form = "packed" if step["packed"] else "unpacked"
    return (f"{step['rows']} {form} rows of {step['length']}, {step['variant']:30s}{step['sequences_per_second']:8.1f} "
            f"sequences/s, {step['tokens_per_second']:9.0f} tokens/s, {step['fraction_of_peak']:5.1%} of the peak, "
            f"{1000 * seconds['median']:.1f} ms ({1000 * seconds['min']:.1f} to {1000 * seconds['max']:.1f})"
            + (f", {memory / 2**30:.1f} GiB" if memory else ""))


if __name__ == "__main__":
    cli.run(main)
