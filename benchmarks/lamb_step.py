"""One LAMB step over BERT-base's parameters against torch's AdamW, foreach and fused, in turn in one process.

    python benchmarks/lamb_step.py [--json]
"""

import copy

from measuring import alternate, machine, report, spread  # puts the repository's root on the path

# isort: split
from common import cli

BERT_BASE = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
             "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 512,
             "num_attention_heads": 12, "num_hidden_layers": 12, "type_vocab_size": 2, "vocab_size": 30522}


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=cli.positive_int, default=9, help="timed repeats of each")
    parser.add_argument("--threads", type=cli.positive_int, default=2, help="CPU threads")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    steps, parameters = optimizer_steps()
    seconds = {name: spread(values) for name, values in alternate(steps, args.repeats, warm_up=2).items()}
    lamb = seconds["lamb"]["median"]
    figures = {"parameters": parameters, "seconds": seconds,
               "ratio_vs_foreach_adamw": lamb / seconds["foreach_adamw"]["median"],
               "ratio_vs_fused_adamw": lamb / seconds["fused_adamw"]["median"], "machine": machine()}
    report(figures, args.json, [
        f"one optimizer step over {parameters / 1e6:.0f} million parameters, {args.threads} threads",
        *(f"  {name:14s}{found['median']:.3f} s ({found['min']:.3f} to {found['max']:.3f})"
          for name, found in seconds.items()),
        f"  LAMB takes {figures['ratio_vs_foreach_adamw']:.2f} of AdamW foreach, "
        f"{figures['ratio_vs_fused_adamw']:.2f} of AdamW fused"])


def optimizer_steps() -> tuple[dict, int]:
    """A step function for each optimizer, each with parameters and gradients of its own."""
    import torch

    from common.bert_config import BertConfig
    from modeling import BertForPreTraining
    from optim.build import parameter_groups
    from optim.fused_lamb import CpuFusedNVLAMB, SlicedNVLAMB

    makers = {"lamb": lambda groups: CpuFusedNVLAMB(groups, lr=1e-3),
              "lamb_in_slices": lambda groups: SlicedNVLAMB(groups, lr=1e-3),
              "foreach_adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, foreach=True),
              "fused_adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, fused=True)}
    model = BertForPreTraining(BertConfig(**BERT_BASE))
    gradients = [torch.randn_like(parameter) * 1e-4 for parameter in model.parameters()]
    steps = {}
    for name, make in makers.items():
        own = copy.deepcopy(model)
        for parameter, gradient in zip(own.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        steps[name] = make(parameter_groups(own)).step
    return steps, sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    cli.run(main)
