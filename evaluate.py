"""MLM loss and accuracy and NSP accuracy of a checkpoint on held-out shards.

    python3 evaluate.py --checkpoint results/checkpoints/ckpt_7038.pt --config_file bert_config.json --eval_dir D
"""

import json

from common import cli
from devices import gaudi_environment
from devices.options import PrecisionOptions
from training.arguments import add_device_choice, device_options


def main(argv=None):
    args = parse_arguments(argv)
    with gaudi_environment.prepared(device_options(args), PrecisionOptions()):
        print_figures(args)


def print_figures(args) -> None:
    import torch

    from checkpoint.load import load_weights
    from data.shards import find_shards
    from devices.device import select_device
    from modeling import BertConfig, BertForPreTraining
    from parallel.ranks import SingleRank
    from parallel.rendezvous import RankInfo
    from training.evaluation import Evaluator, describe_figures

    device = select_device(device_options(args))
    config = BertConfig.from_json_file(args.config_file)
    held_out = find_shards(args.eval_dir, "test", "--eval_dir")
    torch.manual_seed(args.seed)
    model = BertForPreTraining(config, device.attentions[-1])
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    model.to_device(device.torch_device)
    evaluator = Evaluator(shards=held_out, batch_size=args.batch_size, device=device, ranks=SingleRank(RankInfo()))
    figures = evaluator.evaluate(model, progress=not args.disable_progress_bar)
    print(json.dumps(figures, indent=2) if args.json else describe_figures(figures))


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="the checkpoint (default: a freshly initialised model)")
    parser.add_argument("--config_file", required=True, help="its model config, JSON")
    parser.add_argument("--eval_dir", required=True, help="folder of shards (packed, or with 'test' in the name)")
    parser.add_argument("--batch_size", type=cli.positive_int, default=32, help="rows per batch")
    parser.add_argument("--seed", type=int, default=42, help="random seed of the weights without --checkpoint")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    add_device_choice(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    cli.run(main)
