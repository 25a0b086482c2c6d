"""Forward and backward of one micro-batch: this model against transformers' BertForPreTraining.

Same weights, same tokens, train mode with dropout 0.1, in turn in one process; and the share of the machine's
matrix-product peak that ours reaches, counting only the FLOPs that the task needs.  transformers runs with each of its
attention implementations, as it is and compiled; where rows hold several sequences, it takes each row for one, which
is less work than to keep them apart.

With --beside N all are timed again beside N busy processes: how much slower does each get?

    python benchmarks/train_step.py [--model quickstart|mini|base|base_packed] [--rivals …] [--beside N] [--bf16]
                                    [--profile] [--json]
"""

import os
from contextlib import nullcontext

from measuring import alternate, busy_processes, machine, report, spread  # puts the repository's root on the path

# isort: split
from common import cli
from run_pretraining import SPIN_COUNT

SHAPES = {  # layers, hidden size, heads, rows, tokens, sequences a row
    "quickstart": (2, 128, 4, 16, 64, 1),
    "mini": (4, 256, 4, 32, 128, 1),
    "base": (12, 768, 12, 8, 128, 1),
    "base_packed": (12, 768, 12, 2, 512, 2),
}
PREDICTIONS = {64: 10, 128: 20, 512: 80}
VOCABULARY, QUICKSTART_VOCABULARY = 30528, 2048
RIVALS = ("eager", "sdpa", "eager compiled", "sdpa compiled")


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mini", help="which BERT on which batch")
    parser.add_argument("--rivals", choices=RIVALS, nargs="+", default=RIVALS,
                        help="transformers' attention implementations, as they are or through torch.compile")
    parser.add_argument("--repeats", type=cli.positive_int, default=7, help="timed repeats of each")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="CPU threads")
    parser.add_argument("--beside", type=cli.positive_int, metavar="N", help="time all again beside N busy processes")
    parser.add_argument("--bf16", action="store_true", help="bf16 autocast on both sides, and ours in fp32 too")
    parser.add_argument("--profile", action="store_true", help="only say where the time of our step goes")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # as in a run; for both sides

    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layers, hidden, heads, rows, tokens, sequences = SHAPES[args.model]
    vocabulary = QUICKSTART_VOCABULARY if args.model == "quickstart" else VOCABULARY
    ours = our_model(layers, hidden, heads, vocabulary)
    batch = random_batch(rows, tokens, sequences, vocabulary)
    figures = {"model": args.model, "batch": f"{rows} x {tokens}", "sequences": rows * sequences,
               "machine": machine("transformers")}
    if args.profile:
        parts = profile(ours_step(ours, batch), args.repeats)
        report({**figures, "milliseconds": parts}, args.json, [
            f"BERT-{args.model}, {rows} x {tokens} tokens: where {sum(parts.values()):.0f} ms of a step go",
            *(f"  {name:52s}{value:8.1f} ms {value / sum(parts.values()):6.1%}" for name, value in parts.items())])
        return
    cast = bf16_autocast if args.bf16 else nullcontext
    steps = {"ours": ours_step(ours, batch), **rival_steps(ours, batch, args.rivals, cast)}
    if args.bf16:
        fast = our_model(layers, hidden, heads, vocabulary, "hashed")
        fast.load_state_dict(ours.state_dict())
        steps |= {"ours": ours_step(fast, batch, cast), "ours in fp32": steps["ours"]}
        figures["losses"] = losses_without_dropout({"ours in fp32": ours, "ours": fast}, batch, args.rivals)
    seconds = {name: spread(values) for name, values in alternate(steps, args.repeats).items()}
    figures |= compare(ours.config, batch, seconds)
    if args.beside:
        with busy_processes(args.beside):
            busy = {name: spread(values) for name, values in alternate(steps, args.repeats).items()}
        figures["beside"] = compare_slowdowns(args.beside, figures["best_rival"], seconds, busy)
    report(figures, args.json, lines(args, figures))


def compare(config, batch: dict, seconds: dict) -> dict:
    """What the seconds of ours and of the others say."""
    from training.metrics import batch_flops, cpu_peak

    ours, best = seconds["ours"]["median"], min(
        (name for name in seconds if name.startswith("transformers")), key=lambda name: seconds[name]["median"])
    flops, peak = batch_flops(config, batch), cpu_peak(2048, 5)
    return {"seconds": seconds, "best_rival": best, "ratio_vs_transformers": seconds[best]["median"] / ours,
            "sequences_per_second": int(batch["next_sentence_weights"].sum()) / ours, "peak_gflops": peak / 1e9,
            "fraction_of_peak": flops / ours / peak}


def compare_slowdowns(count: int, rival: str, quiet: dict, busy: dict) -> dict:
    """How much longer a step takes beside busy processes, and ours against that of the best of transformers."""
    slowdowns = {name: busy[name]["median"] / quiet[name]["median"] for name in quiet}
    return {"processes": count, "seconds": busy, "slowdowns": slowdowns,
            "slowdown_ratio": slowdowns["ours"] / slowdowns[rival]}


def lines(args, figures: dict) -> list[str]:
    beside = figures.get("beside")
    busy = [] if beside is None else [
        f"beside {beside['processes']} busy processes",
        *(f"  {name:28s}{found['median']:.3f} s ({found['min']:.3f} to {found['max']:.3f}), "
          f"{beside['slowdowns'][name]:.2f} times as long" for name, found in beside["seconds"].items()),
        f"  our slowdown is {beside['slowdown_ratio']:.2f} of that of {figures['best_rival']}"]
    losses = [f"losses without dropout: {', '.join(f'{name} {loss:.5f}' for name, loss in figures['losses'].items())}"
              ] if args.bf16 else []
    return [f"BERT-{args.model}, {figures['batch']} tokens, forward + backward, {'bf16' if args.bf16 else 'fp32'}, "
            f"{args.threads} threads",
            *(f"  {name:28s}{found['median']:.3f} s ({found['min']:.3f} to {found['max']:.3f})"
              for name, found in figures["seconds"].items()),
            f"  {figures['ratio_vs_transformers']:.2f} times as fast as {figures['best_rival']}, "
            f"{figures['fraction_of_peak']:.0%} of the peak of {figures['peak_gflops']:.0f} GFLOP/s, "
            f"{figures['sequences_per_second']:.1f} sequences/s", *losses, *busy]


def bf16_autocast():
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16)


def losses_without_dropout(ours: dict, batch: dict, rivals) -> dict[str, float]:
    """The losses of our models, by name, and of transformers' with the weights of the first."""
    import torch

    first = next(iter(ours.values()))
    attention = rivals[0].split()[0]
    rival = rival_models(first, [attention])[attention]
    found = {}
    with torch.no_grad():
        for name, model in ours.items():
            with nullcontext() if name.endswith("fp32") else bf16_autocast():
                found[name] = model.eval()(batch)["loss"].item()
            model.train()
        with bf16_autocast():
            found["transformers"] = transformers_loss(rival.eval(), batch)().item()
    return found


def our_model(layers: int, hidden: int, heads: int, vocabulary: int, attention: str = "kernels"):
    """Our model in train mode, as a rule through the kernels for this CPU."""
    from common.bert_config import BertConfig
    from modeling import BertForPreTraining

    values = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
              "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": 4 * hidden,
              "max_position_embeddings": 512, "num_attention_heads": heads, "num_hidden_layers": layers,
              "type_vocab_size": 2, "vocab_size": vocabulary}
    return BertForPreTraining(BertConfig(**values), attention).train()


def transformers_model(config, attention: str = "sdpa"):
    """transformers' model of our config, in train mode."""
    import transformers

    values = {**vars(config), "vocab_size": config.padded_vocab_size}
    return transformers.BertForPreTraining(transformers.BertConfig(**values, attn_implementation=attention)).train()


def rival_models(ours, attentions) -> dict:
    """A model of transformers for each attention implementation, with our weights."""
    weights = {name.replace("dense_act", "dense"): value for name, value in ours.state_dict().items()}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    models = {attention: transformers_model(ours.config, attention) for attention in attentions}
    for model in models.values():
        model.load_state_dict(weights)
    return models


def rival_steps(ours, batch: dict, rivals, cast=nullcontext) -> dict:
    """A step function for each rival; those with one attention implementation share a model with our weights."""
    import torch

    models = rival_models(ours, sorted({rival.split()[0] for rival in rivals}))
    steps = {}
    for rival in rivals:
        model = models[rival.split()[0]]
        called = torch.compile(model, dynamic=False) if "compiled" in rival else model
        steps[f"transformers, {rival}"] = training_step(model, transformers_loss(called, batch), cast)
    return steps


def random_batch(rows: int, tokens: int, sequences: int, vocabulary: int) -> dict:
    """Full rows of random tokens in sequences of one length, as many of them masked as the recipes mask."""
    import torch

    slots, length, place = PREDICTIONS[tokens], tokens // sequences, torch.arange(tokens)
    order = torch.rand(rows, tokens - 1).argsort(1)[:, :slots] + 1
    return {"input_ids": torch.randint(1, vocabulary, (rows, tokens)).int(),
            "input_mask": (place // length + 1).expand(rows, -1).int(), "segment_ids": torch.zeros(rows, tokens).int(),
            "positions": (place % length).expand(rows, -1).int(), "masked_lm_positions": order.sort(1).values.int(),
            "masked_lm_ids": torch.randint(1, vocabulary, (rows, slots)).int(),
            "next_sentence_positions": place[::length].expand(rows, -1).int(),
            "next_sentence_labels": torch.randint(0, 2, (rows, sequences)).int(),
            "next_sentence_weights": torch.ones(rows, sequences).int()}


def ours_step(model, batch: dict, cast=nullcontext):
    return training_step(model, lambda: model(batch)["loss"], cast)


def training_step(model, forward, cast=nullcontext):
    """A function that runs forward, which gives the loss, under cast(), and backward."""
    def step():
        model.zero_grad()
        with cast():
            loss = forward()
        loss.backward()
    return step


def transformers_loss(model, batch: dict):
    """A function that gives transformers' loss of a batch, whose rows it takes for one sequence each."""
    import torch

    device = batch["input_ids"].device
    used = batch["masked_lm_positions"] > 0
    rows = torch.arange(len(used), device=device)[:, None].expand_as(used)[used]
    labels = torch.full(batch["input_ids"].shape, -100, device=device)
    labels[rows, batch["masked_lm_positions"][used].long()] = batch["masked_lm_ids"][used].long()
    inputs = {"input_ids": batch["input_ids"].long(), "attention_mask": (batch["input_mask"] > 0).long(),
              "token_type_ids": batch["segment_ids"].long(), "labels": labels,
              "next_sentence_label": batch["next_sentence_labels"][:, 0].long()}
    return lambda: model(**inputs).loss


KERNELS = {  # how the functions of csrc/layers.cpp and PyTorch's operations are summed up
    "matrix products, with bias": ("gemms", "aten::mm", "aten::addmm"),
    "matrix products, with dropout and LayerNorm after": ("dense_residual_norm",),
    "matrix products, with GELU after": ("dense_gelu", "gelu_backward"),
    "attention": ("attention",),
    "dropout and LayerNorm on the way back": ("residual_norm_backward",),
    "cross entropy": ("cross_entropy",),
    "embeddings": ("embed",),
    "zero fills": ("aten::fill_", "aten::zero_"),
}


def profile(step, repeats: int) -> dict[str, float]:
    """Milliseconds of a step by what they are spent on, most first, from torch's profiler."""
    import torch

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        for _ in range(repeats):
            step()
    parts = dict.fromkeys([*KERNELS, "everything else"], 0.0)
    for event in trace.key_averages():
        parts[part_of(event.key)] += event.self_cpu_time_total / 1000 / repeats
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def part_of(event: str) -> str:
    for part, names in KERNELS.items():
        if event in names or event.removesuffix("_backward") in names:
            return part
    return "everything else"


if __name__ == "__main__":
    cli.run(main)
