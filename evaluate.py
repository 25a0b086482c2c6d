"""MLM loss and accuracy and NSP accuracy of a checkpoint on held-out shards.

    python3 evaluate.py --checkpoint results/checkpoints --eval_dir D
"""

import json
import sys

from common import cli
from common.errors import UserError
from common.files import write_json
from data.shard_reader import ShardReader
from devices import gaudi_environment
from devices.options import PrecisionOptions
from training.arguments import add_device_choice, device_options


def main(argv=None):
    args = parse_arguments(argv)
    with ShardReader() as reader, gaudi_environment.prepared(device_options(args), PrecisionOptions()):
        return print_figures(args, reader)


def print_figures(args, reader: ShardReader) -> int:
    """Evaluate and print; returns the exit code."""
    import torch

    from checkpoint.trained_model import open_trained_model
    from common.bert_config import BertConfig
    from devices.device import select_device
    from modeling import BertForPreTraining
    from ops import attention
    from parallel.ranks import SingleRank
    from parallel.rendezvous import RankInfo
    from training.evaluation import Evaluator, describe_figures

    device = select_device(device_options(args))
    trained = open_trained_model(args.checkpoint, args.config_file) if args.checkpoint else None
    config = trained.config if trained else BertConfig.from_json_file(args.config_file)
    training, held_out = checked_shards(args, config, trained)
    torch.manual_seed(args.seed)
    request = attention.LayerRequest(attention=None, use_cpu_kernels=True, compiled=False, dtype=torch.float32,
                                     rows=args.batch_size, length=held_out[0].sequence_length)
    kernels = attention.reason_against_kernels(device, config, request) is None
    model = BertForPreTraining(config, attention.KERNELS if kernels else device.attentions[-1])
    if trained:
        trained.load_into(model)
    model.to_device(device.torch_device)
    evaluator = Evaluator(shards=held_out, batch_size=args.batch_size, device=device, ranks=SingleRank(RankInfo()),
                          reader=reader, token_counts=training_counts(training, trained, config.vocab_size, reader))
    figures = evaluator.evaluate(model, progress=not args.disable_progress_bar)
    print(json.dumps(figures, indent=2) if args.json else describe_figures(figures))
    if args.json_file:
        write_json(args.json_file, figures)
    if args.margin is not None:
        return check_margin(figures, args.margin)
    return 0


def checked_shards(args, config, trained) -> tuple[list | None, list]:
    """The shards of --input_dir, None without it, and of --eval_dir; UserError where they do not fit the model."""
    from data.origin import TEXTS, check_vocabulary, held_from_training, texts_of
    from data.shards import find_shards
    from data.vocabulary import check_same_vocabulary

    known, what = (trained.vocabulary, str(trained.path)) if trained else (None, "")
    training = find_shards(args.input_dir) if args.input_dir else None
    held_out = find_shards(args.eval_dir, "test", "--eval_dir")
    for flag, folder, found in (("--input_dir", args.input_dir, training), ("--eval_dir", args.eval_dir, held_out)):
        vocabulary = check_vocabulary(found or [], config.vocab_size)
        check_same_vocabulary(vocabulary, f"{flag} {folder}", known, what)
        known, what = (vocabulary, f"{flag} {folder}") if known is None else (known, what)
    named = trained.contents.get(TEXTS) if trained else None
    texts = texts_of(training) if training else set(map(str, named)) if isinstance(named, list) else set()
    of_training = held_from_training(held_out, texts) if texts else None
    if of_training:
        print(f"warning: --eval_dir {args.eval_dir}: {of_training.name} is, or was made from, what the model was "
              "trained on: its figures are not those of held-out text", file=sys.stderr)
    return training, held_out


def training_counts(training: list | None, trained, vocab_size: int, reader: ShardReader):
    """How often each token occurs in the training set: from its shards, else from the checkpoint, else None."""
    import torch

    from data.dataloader import check_first_rows
    from data.token_counts import TOKEN_COUNTS, stored_counts

    if training:
        counts = stored_counts(training, vocab_size)
        if counts is None:
            counts = check_first_rows(training, vocab_size, reader, skip_bad_shards=False)
        return torch.from_numpy(counts)
    counts = trained and trained.contents.get(TOKEN_COUNTS)
    if isinstance(counts, torch.Tensor) and counts.dtype == torch.int64 and counts.shape == (vocab_size,):
        return counts
    return None


def check_margin(figures: dict, margin: float) -> int:
    """The exit code: 1, and a line, where the MLM loss is not `margin` nats below what is reached without context."""
    line = figures.get("context_free_mlm_loss")
    if line is None:
        raise UserError(f"--margin {margin}: the training set's token counts are in neither the checkpoint nor an "
                        f"--input_dir")
    if line - figures["mlm_loss"] >= margin:
        return 0
    print(f"error: --margin {margin}: the MLM loss {figures['mlm_loss']:.4f} is not {margin} nats below the "
          f"{line:.4f} that a model without context reaches", file=sys.stderr)
    return 1


def parse_arguments(argv):
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=cli.path_or_url,
                        help="ckpt_<step>.pt, a folder of them, of which the newest is taken, or a Hugging Face "
                        "model folder (default: a freshly initialised model)")
    parser.add_argument("--config_file", help="its model config, JSON (default: the one in the checkpoint)")
    parser.add_argument("--eval_dir", type=cli.path_or_url, required=True,
                        help="folder of shards (packed, or with 'test' in the name)")
    parser.add_argument("--input_dir", type=cli.path_or_url, help="folder of the training shards, whose "
                        "token frequencies give what can be predicted without context (default: those that "
                        "the checkpoint holds)")
    parser.add_argument("--margin", type=float, metavar="NATS", help="end with exit code 1 unless the MLM loss is at "
                        "least this far below what can be predicted without context")
    parser.add_argument("--batch_size", type=cli.positive_int, default=32, help="rows per batch")
    parser.add_argument("--seed", type=cli.whole, default=42, help="random seed of the weights without --checkpoint")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--json_file", metavar="FILE", help="also write the figures as JSON to a file")
    parser.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")
    add_device_choice(parser)
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.config_file:
        parser.error("give --checkpoint, or --config_file for a freshly initialised model")
    return args


if __name__ == "__main__":
    cli.run(main)
