"""BERT pre-training: masked LM and next sentence prediction, two phases, LAMB; on Gaudi, CUDA or CPU.

    python3 run_pretraining.py --do_train --config_file bert_config.json --input_dir D --output_dir O …

docs/training.md has the recipes.  This file reads the flags, checks the input, and builds the parts of the run;
training/trainer.py holds the loop.  torch is imported after the flags and the launcher's variables are read, because
Gaudi's software reads and changes the environment during that import.
"""

import os
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common import cli
from common.errors import UserError, whole_number
from common.locks import file_lock, folder_lock
from common.mirrored_file import mirrored_log
from common.object_locks import object_lock, prefix_lock
from common.object_store import is_s3
from data.shard_reader import ShardReader
from devices import gaudi_environment
from parallel import rendezvous
from training.arguments import contradiction_of_steps, device_options, parse_arguments, precision_options

# How often a waiting OpenMP thread looks again before it sleeps: about 0.4 ms.  The default, some 13 ms, keeps a core
# from whatever else wants to run there, and a step of a small model beside one busy process took 40 times as long.
SPIN_COUNT = "10000"
STOPPED = 75  # exit code of a rank that a signal has stopped, where torchrun is to start the ranks again


def main(argv=None) -> int | None:
    """Returns the exit code of a run that a signal has stopped, else None."""
    args = parse_arguments(argv)
    if rendezvous.torchrun_restarts(os.environ):
        args.stopped_exit_code = args.stopped_exit_code or STOPPED
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is imported
    info = rendezvous.rank_info(os.environ, args.local_rank)
    rendezvous.set_variables(info, os.environ)
    device, precision = device_options(args, args.use_torch_compile), precision_options(args)
    with ShardReader() as reader, gaudi_environment.prepared(device, precision, info.local_rank):
        stopped = pretrain(args, info, reader).get("stopped", False)
    return args.stopped_exit_code if stopped else None


def pretrain(args, info: rendezvous.RankInfo, reader) -> dict:
    """Train, or make the dry run; returns the figures of its summary."""
    from checkpoint.folder import open_folder, saved_steps
    from parallel.ranks import init_ranks

    with init_ranks(info, args.collective_timeout) as ranks, ranks.first_holds(output_locks(args)):
        if rendezvous.torchrun_restarts(os.environ) and saved_steps(open_folder(args.output_dir)):
            args.resume_from_checkpoint = True
        writes = ranks.first and not args.dry_run
        with mirrored_log(args.json_summary if writes else None, args.resume_from_checkpoint, ranks.warn) as log_path:
            return pretrain_rank(args, ranks, reader, log_path)


@contextmanager
def output_locks(args):
    """A block in which no other run writes to --output_dir and --json_summary; a dry run writes nothing."""
    with ExitStack() as locks:
        if not args.dry_run:
            lock = prefix_lock if is_s3(args.output_dir) else folder_lock
            locks.enter_context(lock(args.output_dir, f"--output_dir {args.output_dir}"))
            if is_s3(args.json_summary):
                locks.enter_context(object_lock(args.json_summary, f"--json_summary {args.json_summary}"))
            elif not Path(args.json_summary).exists() or Path(args.json_summary).is_file():  # as /dev/null is not
                locks.enter_context(file_lock(args.json_summary, f"--json_summary {args.json_summary}"))
        yield


def pretrain_rank(args, ranks, reader, log_path) -> dict:
    """The work of one rank.  Nothing but locks is written before everything has been checked."""
    import torch

    from checkpoint.folder import open_folder
    from checkpoint.remote_folder import RemoteFolder
    from checkpoint.resume import PHASE1_STEPS, Phase, find_resume_point, last_step_of_phase1
    from checkpoint.state import TrainingState
    from data.dataloader import BatchStream
    from data.origin import known_texts
    from data.vocabulary import check_size
    from devices.device import select_device
    from devices.precision import Precision
    from modeling import BertForPreTraining
    from ops import attention
    from optim.build import OptimizerOptions, build_optimizer
    from parallel.gradient_reduction import broadcast_weights, build_reduction
    from training import bf16_speed, dry_run
    from training.compilation import compile_training
    from training.data_sets import (
        find_training_set,
        held_out_shards,
        training_token_counts,
        training_vocabulary,
    )
    from training.early_stopping import EarlyStopping
    from training.evaluation import Evaluator
    from training.log import TensorBoardLog, TrainingLog, summary_writer
    from training.run_record import reference_record, run_record
    from training.trainer import BatchPlan, Trainer

    started = time.time()
    device = select_device(device_options(args, args.use_torch_compile), ranks.local_rank)
    precision = Precision(precision_options(args), device)
    if args.tensorboard_logdir:
        summary_writer()

    folder = open_folder(args.output_dir)
    if isinstance(folder, RemoteFolder) and not args.dry_run and ranks.local_rank == 0:
        folder.prepare()
    if args.phase1_end_step is None:
        args.phase1_end_step = last_step_of_phase1(folder, ranks.warn) if args.phase2 else PHASE1_STEPS
    phase = Phase(2, args.phase1_end_step) if args.phase2 else Phase()
    resume_point = find_resume_point(folder, phase, resume=args.resume_from_checkpoint,
                                     resume_step=args.resume_step, init_checkpoint=args.init_checkpoint,
                                     warn=ranks.warn)
    training_set = find_training_set(args, reader, ranks.warn)
    shards = training_set.shards
    vocabulary = training_vocabulary(args.input_dir, shards, resume_point, reader)
    resume_point = resume_point.with_words_of(vocabulary, ranks.warn).for_objective(shards[0].objective.nsp)
    config = model_config(args.config_file, resume_point, vocabulary)
    token_counts = training_token_counts(args, config, training_set, reader, ranks.warn)
    if vocabulary:  # where the shards do not say it, the checkpoint's
        check_size(vocabulary.size, config.vocab_size, f"{resume_point.path}, its vocabulary")
    held_out = held_out_shards(args, config, shards, vocabulary, reader)
    plan = BatchPlan.from_flags(args, training_set.sequences_per_row, ranks.world_size)
    plan, kept_batch = (plan_of_restart(plan, resume_point, ranks.world_size)
                        if rendezvous.torchrun_restarts(os.environ) else (plan, ""))
    settle_steps(args, plan, training_set.rows, ranks)
    ranks.connect(device)
    ranks.check_same(run_fingerprint(args, config, shards, resume_point))

    device.seed(args.seed)
    request = attention.LayerRequest(attention=args.attention, use_cpu_kernels=args.use_cpu_kernels,
                                     compiled=args.use_torch_compile, dtype=precision.dtype,
                                     rows=plan.micro_batch_size, length=args.max_seq_length,
                                     op_lists=precision.by_op_lists)
    attention_name, layers_description = ranks.gather(attention.choose(device, config, request))[0]
    bf16_warning = bf16_speed.bf16_warning(device, config, attention_name, request, precision.autocast)
    if bf16_warning:
        ranks.warn(bf16_warning)
    model = BertForPreTraining(config, attention_name, args.checkpoint_activations, precision.autocast,
                               precision.casts_off, args.mlm_loss_chunk)
    model = model if shards[0].objective.nsp else model.without_nsp()
    model.to_device(device.torch_device).train()
    compiled, compile_description = (
        compile_training(device, model, cuda_graphs=args.cuda_graphs, compiled_autograd=not args.no_compiled_autograd)
        if args.use_torch_compile else (False, ""))
    if args.use_hpu_graphs:
        device.cache_graphs(model)
    optimizer_options = cli.options_from(args, OptimizerOptions, name=args.optimizer)
    if optimizer_options.rate_warning:
        ranks.warn(optimizer_options.rate_warning)
    optimizer, optimizer_description = build_optimizer(
        model, device, optimizer_options, compiled, shards=ranks.world_size if args.use_zero_optimizer else 1)
    stream = BatchStream(shards, plan.micro_batch_size, args.seed, config.vocab_size, ranks=ranks, reader=reader,
                         mixture=training_set.mixture, skip_bad_shards=args.skip_bad_shards, warn=ranks.warn)
    state = TrainingState(model=model, optimizer=optimizer, stream=stream, precision=precision,
                          token_counts=torch.from_numpy(token_counts), vocabulary=vocabulary,
                          texts=known_texts(shards), init_checkpoint=resume_point.init_checkpoint,
                          early_stopping=EarlyStopping(args.early_stopping) if args.early_stopping else None)
    resume_point.restore(state)
    device.synchronize()  # keeps copying the weights out of the first step's graph
    broadcast_weights(ranks, model)
    reduction = build_reduction(ranks, model, post_accumulation=args.allreduce_post_accumulation,
                                in_16_bits=args.allreduce_post_accumulation_fp16, fp16=args.fp16)

    writes = ranks.first and not args.dry_run
    tensorboard = (TensorBoardLog(args.tensorboard_logdir, phase.first, resume_point.step)
                   if writes and args.tensorboard_logdir else None)
    log = TrainingLog(log_path, ranks.first, args.resume_from_checkpoint,
                      tensorboard=tensorboard, started=started, dllogger_console=args.dllogger_console and writes)
    descriptions = {"precision": precision.describe(), "layers": layers_description,
                    "optimizer": optimizer_description, "reduction": reduction.describe(),
                    "compilation": compile_description}
    log.write("PARAMETER", {**reference_record(args, plan), **vars(args),
                            **run_record(config=config, device=device, world_size=ranks.world_size, plan=plan,
                                         descriptions=descriptions)})
    for line in (*header_lines(args, device, precision, stream.pieces, model, plan, resume_point),
                 kept_batch, *training_set.describe(), layers_description, optimizer_description,
                 f"ranks: {ranks.world_size}; reduction of gradients: {reduction.describe()}", compile_description):
        if line:
            log.print(line)
    stream.warn = log.warn
    evaluator = Evaluator(shards=held_out, batch_size=plan.micro_batch_size, device=device, ranks=ranks, reader=reader,
                          autocast=precision.autocast, token_counts=state.token_counts) if held_out else None
    try:
        trainer = Trainer(args=args, ranks=ranks, device=device, state=state, reduction=reduction, plan=plan,
                          phase=phase, first_step=resume_point.step, evaluator=evaluator, log=log,
                          folder=folder)
        if args.dry_run:
            return dry_run.dry_run(trainer)
        summary = trainer.train()
        log.print(final_line(args, summary))
        return {**summary, "stopped": trainer.stopped}
    finally:
        stream.close()
        log.close()


def plan_of_restart(plan, resume_point, world_size: int):
    """The plan with which torchrun continues a run on any number of ranks, with its global batch, and a line on it."""
    from checkpoint.state import STEP_ROWS

    rows = whole_number(resume_point.contents or {}, STEP_ROWS, str(resume_point.path))
    kept = plan.with_step_rows(rows, world_size) if rows else plan
    found = kept.rows * world_size
    if kept.accumulation_steps == plan.accumulation_steps and found == kept.step_rows:
        return kept, ""
    kind = "as before the restart" if found == rows else f"the nearest to the {rows} of before the restart"
    return kept, (f"global batch: {found} rows a step on {world_size} ranks, {kind}: {kept.accumulation_steps} "
                  f"accumulation steps, {plan.accumulation_steps} by the flags")


def settle_steps(args, plan, rows: int, ranks) -> None:
    """Set --max_steps where --num_train_epochs says it, and check the flags that name steps against it."""
    if args.max_steps is None:
        args.max_steps = plan.steps(args.num_train_epochs, rows, ranks.world_size)
        problem = contradiction_of_steps(args)
        if problem:
            raise UserError(f"{problem} (--num_train_epochs {args.num_train_epochs:g})")
    elif args.num_train_epochs is not None:
        ranks.warn(f"--num_train_epochs {args.num_train_epochs:g} has no effect beside --max_steps")


def run_fingerprint(args, config, shards, resume_point) -> dict[str, str]:
    """What must be the same on all ranks besides their software, by name: flags, config, data and resume point."""
    return {
        **{f"--{flag}": str(value) for flag, value in vars(args).items() if flag != "local_rank"},
        **{f"{args.config_file or 'config'}: {key}": str(value) for key, value in vars(config).items()},
        **{f"--input_dir: {shard.file_name}": f"{shard.rows} rows, {shard.file_bytes} bytes"
           for shard in shards},
        "the start (is --output_dir a folder that all servers share?)": resume_point.describe(),
    }


def model_config(config_file: str | None, resume_point, vocabulary):
    """The architecture of a run: that of --config_file, else that of the checkpoint which it starts from."""
    from checkpoint.load import config_of

    if not config_file and resume_point.contents is None:
        raise UserError("--config_file is not given, and there is no checkpoint to start from that says it: name the "
                        "model's config")
    return config_of(resume_point.contents or {}, resume_point.path, config_file, vocabulary.size if vocabulary else 0)


def header_lines(args, device, precision, pieces, model, plan, resume_point) -> list[str]:
    """Lines for the console: model, data, batch and first step."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    form, objective = "packed" if pieces[0].packed else "unpacked", pieces[0].objective.description
    shards = len({piece.path for piece in pieces})
    input_dir = args.input_dir if isinstance(args.input_dir, str) else ", ".join(args.input_dir)
    return [
        f"{args.bert_model}: {parameters / 1e6:.1f} million parameters on {device.describe()}, {precision.describe()}",
        f"data: {sum(piece.rows for piece in pieces)} {form} rows of {args.max_seq_length} tokens in "
        f"{shards} shards of {input_dir}" + (f", read in {len(pieces)} pieces" if len(pieces) > shards else "")
        + objective,
        plan.describe(),
        f"phase {2 if args.phase2 else 1}, from step {resume_point.step} of {args.max_steps}"
        + resume_point.origin,
    ]


def final_line(args, summary: dict) -> str:
    if summary["final_loss"] is None:
        return "nothing left to do: the last step was reached before"
    speed = summary["steady_sequences_per_second"]
    return (f"final loss {summary['final_loss']:.4f}, {summary['e2e_train_time']:.1f} s"
            + (f", {speed:.1f} sequences/s" if speed else "") + f"; log: {args.json_summary}")


if __name__ == "__main__":
    cli.run(main)
