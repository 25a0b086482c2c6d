"""Forward and backward of one micro-batch: this model against transformers' BertForPreTraining.

Same weights, same batch, train mode with dropout 0.1, in turn in one process; and the share of the machine's
matrix-product peak that ours reaches, counting only the FLOPs that the task needs.

    python benchmarks/train_step.py [--model mini|base] [--json]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cli
from benchmarks.measuring import alternate, machine, report, spread

SHAPES = {  # layers, hidden size, heads, rows, tokens
    "mini": (4, 256, 4, 32, 128),
    "base": (12, 768, 12, 8, 128),
}
PREDICTIONS = {128: 20, 512: 80}
VOCABULARY = 30528


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="mini", help="which BERT on which batch")
    parser.add_argument("--repeats", type=cli.positive_int, default=7, help="timed repeats of each")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    import torch

    from utilization import NeededFlops, matrix_peak

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    layers, hidden, heads, rows, tokens = SHAPES[args.model]
    ours, theirs = models(layers, hidden, heads)
    batch = random_batch(rows, tokens)
    steps = {"ours": ours_step(ours, batch), "transformers": transformers_step(theirs, batch)}
    ours_seconds, their_seconds = map(spread, alternate(steps, args.repeats).values())
    flops, peak = NeededFlops(ours.config).of_batch(batch), matrix_peak("cpu", torch.float32, 2048, 5)
    figures = {
        "model": args.model, "batch": f"{rows} x {tokens}",
        "seconds": ours_seconds, "transformers_seconds": their_seconds,
        "ratio_vs_transformers": their_seconds["median"] / ours_seconds["median"],
        "sequences_per_second": rows / ours_seconds["median"], "peak_gflops": peak / 1e9,
        "fraction_of_peak": flops / ours_seconds["median"] / peak, "machine": machine("transformers")}
    report(figures, args.json, [
        f"BERT-{args.model}, {rows} x {tokens} tokens, forward + backward, fp32, {args.threads} threads",
        f"  this model    {ours_seconds['median']:.3f} s ({ours_seconds['min']:.3f} to {ours_seconds['max']:.3f})",
        f"  transformers  {their_seconds['median']:.3f} s ({their_seconds['min']:.3f} to {their_seconds['max']:.3f})",
        f"  ratio {figures['ratio_vs_transformers']:.2f}, {figures['fraction_of_peak']:.0%} of the peak of "
        f"{peak / 1e9:.0f} GFLOP/s"])


def models(layers: int, hidden: int, heads: int, attention="kernels"):
    """Our model and transformers' with the same weights, both in train mode."""
    import transformers

    from modeling import BertConfig, BertForPreTraining

    values = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
              "hidden_size": hidden, "initializer_range": 0.02, "intermediate_size": 4 * hidden,
              "max_position_embeddings": 512, "num_attention_heads": heads, "num_hidden_layers": layers,
              "type_vocab_size": 2, "vocab_size": VOCABULARY}
    ours = BertForPreTraining(BertConfig(**values), attention).train()
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**values, attn_implementation="sdpa")).train()
    weights = {name.replace("dense_act", "dense"): value for name, value in ours.state_dict().items()}
    weights["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    theirs.load_state_dict(weights)
    return ours, theirs


def random_batch(rows: int, tokens: int) -> dict:
    """Full rows of random tokens, as many of them masked as the recipes mask."""
    import torch

    slots = PREDICTIONS[tokens]
    order = torch.rand(rows, tokens - 1).argsort(1)[:, :slots] + 1
    return {"input_ids": torch.randint(1, VOCABULARY, (rows, tokens)).int(),
            "input_mask": torch.ones(rows, tokens).int(), "segment_ids": torch.zeros(rows, tokens).int(),
            "positions": torch.arange(tokens).expand(rows, -1).int(), "masked_lm_positions": order.sort(1).values.int(),
            "masked_lm_ids": torch.randint(1, VOCABULARY, (rows, slots)).int(),
            "next_sentence_positions": torch.zeros(rows, 1).int(),
            "next_sentence_labels": torch.randint(0, 2, (rows, 1)).int(),
            "next_sentence_weights": torch.ones(rows, 1).int()}


def ours_step(model, batch: dict):
    def step():
        model.zero_grad()
        model(batch)["loss"].backward()
    return step


def transformers_step(model, batch: dict):
    import torch

    labels = torch.full(batch["input_ids"].shape, -100)
    labels.scatter_(1, batch["masked_lm_positions"].long(), batch["masked_lm_ids"].long())
    inputs = {"input_ids": batch["input_ids"].long(), "attention_mask": batch["input_mask"].long(),
              "token_type_ids": batch["segment_ids"].long(), "labels": labels,
              "next_sentence_label": batch["next_sentence_labels"].long().flatten()}

    def step():
        model.zero_grad()
        model(**inputs).loss.backward()
    return step


if __name__ == "__main__":
    cli.run(main)
