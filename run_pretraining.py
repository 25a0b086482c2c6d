"""BERT pre-training: masked LM and next sentence prediction, two phases, LAMB; on Gaudi, CUDA or CPU.

    python3 run_pretraining.py --do_train --config_file bert_config.json --input_dir D --output_dir O …

README.md has the recipes.  This file reads the flags, checks everything that can be wrong, and puts the run together;
training.py holds the loop.  torch is imported after the flags are read: Gaudi's software reads its environment then.
"""

from functools import partial

from common import cli
from common.errors import UserError
from data.shard_reader import ShardReader
from devices import gaudi_environment
from training.arguments import device_options, parse_arguments, precision_options


def main(argv=None) -> None:
    args = parse_arguments(argv)
    device, precision = device_options(args, args.use_torch_compile), precision_options(args)
    with gaudi_environment.prepared(device, precision), ShardReader() as reader:
        pretrain(args, reader)


def pretrain(args, reader) -> dict:
    """Train as the flags say; the figures of the summary."""
    from parallel.ranks import init_ranks

    with init_ranks(args.local_rank, args.collective_timeout) as process:
        return run(args, process, reader)


def run(args, process, reader) -> dict:
    """The part of one rank in the training.  Nothing is written before everything has been checked."""
    from checkpoint import folder as checkpoint
    from data import dataloader as dataset
    from devices.device import select_device
    from devices.precision import Precision
    from modeling import BertConfig, BertForPreTraining
    from ops import attention
    from optim.build import build_optimizer, local_part, restore_skip_counts
    from parallel.gradient_reduction import broadcast_weights, build_reduction
    from training import dry_run
    from training.compilation import compile_training
    from training.log import TrainingLog
    from training.tensorboard_log import summary_writer
    from training.trainer import BatchPlan, Trainer

    device = select_device(device_options(args, args.use_torch_compile), process.local_rank)
    precision = Precision(precision_options(args), device)
    if args.tensorboard_logdir:
        summary_writer()

    config = BertConfig.from_json_file(args.config_file)
    shards = training_shards(args, config, reader, process.warn)
    held_out = held_out_shards(args, config, reader)
    plan = BatchPlan.from_flags(args, dataset.average_sequences_per_row(shards, reader, args.skip_bad_shards))
    start = checkpoint.find_start(args, report=process.warn)
    process.connect(device)
    process.check_same(run_fingerprint(args, config, shards, device, start))
    left_out = {}
    if start.data:
        shards, left_out = dataset.as_before(shards, start.data, args.skip_bad_shards, process.warn)

    device.seed(args.seed)
    kind, layers_choice = process.gather(attention.choose(args, device, config, plan.micro_batch_size))[0]
    model = BertForPreTraining(config, kind, args.checkpoint_activations, precision.autocast, precision.casts_off,
                               args.mlm_loss_chunk)
    if start.state:
        checkpoint.check_architecture(config, start.state, start.path)
        checkpoint.load_model(model, start.state["model"], start.path)
    model.to_device(device.torch_device).train()
    broadcast_weights(process, model)
    reduction = build_reduction(process, model, post_accumulation=args.allreduce_post_accumulation,
                                in_16_bits=args.allreduce_post_accumulation_fp16, fp16=args.fp16)
    optimizer, choice = build_optimizer(args, model, device, process.world_size)
    if start.state and start.state.get("optimizer") is not None:
        checkpoint.load_optimizer(optimizer, start.state["optimizer"], start.path)
    restore_skip_counts(optimizer, start.skipped)
    precision.load_state_dict(start.scaler)
    choices = [layers_choice, choice, f"ranks: {process.world_size}; reduction of gradients: {reduction.describe()}"]
    if args.use_torch_compile:
        choices.append(compile_training(device, model, local_part(optimizer), args.cuda_graphs))

    writes = process.first and not args.dry_run
    log = TrainingLog(args.json_summary if writes else None, process.first, args.resume_from_checkpoint,
                      tensorboard_log(args, start) if writes else None)
    log.write("PARAMETER", {**vars(args), "config": vars(config), "device": device.describe()})
    for line in [*opening(args, device, precision, shards, model, plan, start), *choices]:
        log.say(line)
    stream = dataset.BatchStream(shards, plan.micro_batch_size, args.seed, config.vocab_size, process.rank,
                                 process.world_size, start.rows, left_out, reader,
                                 report=log.warn if args.skip_bad_shards else None, gather=process.gather)
    try:
        trainer = Trainer(args, process, device, precision, model, reduction, optimizer, stream, plan, start, held_out,
                          log)
        if args.dry_run:
            return dry_run.rehearse(trainer)
        summary = trainer.train()
        log.say(closing(args, summary))
        return summary
    finally:
        stream.close()
        log.close()


def run_fingerprint(args, config, shards, device, start) -> dict[str, str]:
    """What must be the same on all ranks, by name: flags, config, data, software and starting point."""
    import torch

    return {
        **{f"--{flag}": str(value) for flag, value in vars(args).items() if flag != "local_rank"},
        **{f"{args.config_file}: {key}": str(value) for key, value in vars(config).items()},
        **{f"{args.input_dir}/{shard.path.name}": f"{shard.rows} rows, {shard.path.stat().st_size} bytes"
           for shard in shards},
        "the device": device.kind,
        "PyTorch": torch.__version__,
        "the start (is --output_dir a folder that all servers share?)":
            f"step {start.step}, {start.rows} rows used, {start.path or 'no checkpoint'}",
    }


def training_shards(args, config, reader, report) -> list:
    """The shards of --input_dir, checked against the flags and the config."""
    from data import dataloader as dataset
    from data import shards as shard_files

    unreadable = [] if args.skip_bad_shards else None
    found = shard_files.find(args.input_dir, inspect=partial(reader.call, shard_files.inspect), unreadable=unreadable)
    for fault in unreadable or ():
        report(f"left out from the start: {fault}")
    first = found[0]
    if first.sequence_length != args.max_seq_length:
        raise UserError(f"{first.path}: its rows have {first.sequence_length} tokens, "
                        f"but --max_seq_length is {args.max_seq_length}")
    predictions = first.prediction_slots - (first.max_sequences if first.packed else 0)
    if predictions > args.max_predictions_per_seq:
        raise UserError(f"{first.path}: made with {predictions} predictions a sequence, "
                        f"but --max_predictions_per_seq is {args.max_predictions_per_seq}")
    if args.enable_packed_data_mode is not None:
        report("--enable_packed_data_mode is deprecated: the shards decide")
        if args.enable_packed_data_mode != first.packed:
            raise UserError(f"--enable_packed_data_mode {args.enable_packed_data_mode}, but the shards in "
                            f"{args.input_dir} are {'packed' if first.packed else 'not packed'}")
    if args.avg_seq_per_pack is not None:
        report("--avg_seq_per_pack is deprecated and has no effect: the data decides")
    check_length("--max_seq_length", args.max_seq_length, config)
    if not args.skip_bad_shards:
        dataset.check_first_rows(found, config.vocab_size, reader)
    return found


def held_out_shards(args, config, reader) -> list | None:
    from data import shards as shard_files

    if not args.eval_dir:
        return None
    found = shard_files.find(args.eval_dir, "test", "--eval_dir", partial(reader.call, shard_files.inspect))
    check_length(f"{found[0].path}: the row length", found[0].sequence_length, config)
    return found


def tensorboard_log(args, start):
    from training.tensorboard_log import TensorBoardLog

    if not args.tensorboard_logdir:
        return None
    return TensorBoardLog(args.tensorboard_logdir, args.phase1_end_step if args.phase2 else 0, start.step)


def check_length(what: str, length: int, config) -> None:
    if length > config.max_position_embeddings:
        raise UserError(f"{what} {length} is above max_position_embeddings {config.max_position_embeddings}")


def opening(args, device, precision, shards, model, plan, start) -> list[str]:
    """What a person wants to know as the run starts."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    form = "packed" if shards[0].packed else "unpacked"
    return [
        f"{args.bert_model}: {parameters / 1e6:.1f} million parameters on {device.describe()}, {precision.describe()}",
        f"data: {sum(shard.rows for shard in shards)} {form} rows of {args.max_seq_length} tokens in "
        f"{len(shards)} shards of {args.input_dir}",
        plan.describe(),
        f"phase {2 if args.phase2 else 1}, from step {start.step} of {args.max_steps}"
        + (f", from {start.path}" if start.path else ""),
    ]


def closing(args, summary: dict) -> str:
    if summary["final_loss"] is None:
        return "nothing left to do: the last step was reached before"
    speed = summary["training_sequences_per_second"]
    return (f"final loss {summary['final_loss']:.4f}, {summary['e2e_train_time']:.1f} s"
            + (f", {speed:.1f} sequences/s" if speed else "") + f"; log: {args.json_summary}")


if __name__ == "__main__":
    cli.run(main)
