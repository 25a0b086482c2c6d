"""The flags of run_pretraining.py, each declared once.  No torch here."""

import argparse
import os

from common.cli import (
    BOOLEAN,
    ArgumentParser,
    free_text,
    options_from,
    path_or_s3,
    path_or_url,
    positive_float,
    positive_int,
    proportion,
    whole,
)
from common.errors import UserError
from common.object_store import is_s3
from data.mixture import is_part, parse_sources
from devices.options import DeviceOptions, PrecisionOptions
from optim.lr_schedule import SCHEDULES

DESCRIPTION = """BERT pre-training (masked LM + next sentence prediction) with LAMB, on Gaudi, CUDA and CPU.

    python3 run_pretraining.py --do_train --config_file bert_config.json --input_dir packed/phase1 \\
        --output_dir results/checkpoints --train_batch_size 8192 --gradient_accumulation_steps 128 \\
        --max_seq_length 128 --max_predictions_per_seq 20 --max_steps 7038 --warmup_proportion 0.2843 \\
        --learning_rate 6e-3

Batch sizes are per card and optimizer step; steps are optimizer steps."""

DEFAULT_STEPS = 1000
FIRST_WORKER = "worker_0"  # the folder of rank 0's TensorBoard figures, where the reference scripts look for them


def parse_arguments(argv=None) -> argparse.Namespace:
    """The flags as a namespace.  Ends with one line and exit code 2 if a flag is unknown or flags are contradictory."""
    parser = build_parser()
    args = with_implied_flags(parser.parse_args(argv))
    problem = contradiction(args)
    if problem:
        parser.error(problem)
    return args


def with_implied_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The flags with those that others imply."""
    implied = {"input_dir": args.input_dir[0] if len(args.input_dir) == 1 else args.input_dir}
    if args.allreduce_post_accumulation_fp16:
        implied["allreduce_post_accumulation"] = True
    if args.phase2 and not args.init_checkpoint:
        implied["resume_from_checkpoint"] = True
    if args.max_steps is None and args.num_train_epochs is None:
        implied["max_steps"] = DEFAULT_STEPS
    if args.enable_tensorboard_logging and not args.tensorboard_logdir:
        implied["tensorboard_logdir"] = os.path.join(args.output_dir, FIRST_WORKER)
    return argparse.Namespace(**{**vars(args), **implied})


class DataSets(argparse.Action):
    """The data sets of --input_dir.  Given again, a folder replaces what was named before, as with other flags; a part
    of a mixture is added to other parts."""

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest) or []
        both = [*before, *values]
        setattr(namespace, self.dest, both if all(map(is_part, both)) else values)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(description=DESCRIPTION)
    for add in (add_files, add_batches, add_schedule, add_precision, add_device, add_many_cards, add_checkpoints,
                add_log, add_accepted):
        add(parser)
    return parser


def command_flags(values: dict) -> list[str] | None:
    """The words of the command line that gives these values of the flags; flags at their defaults are left out.

    `values` come from JSON, where a tuple is a list.  The rank's own --local_rank is left out too.  None where a
    required flag has no value.

        >>> command_flags({"do_train": True, "input_dir": "D", "config_file": "C", "output_dir": "O", "seed": 42})
        ['--do_train', '--input_dir=D', '--config_file=C', '--output_dir=O']
    """
    words = []
    for action in build_parser()._actions:
        value = values.get(action.dest)
        if value is None and action.required:
            return None
        if action.nargs == "+" and isinstance(value, list):
            words += [action.option_strings[0], *value]
            continue
        text = ":".join(map(str, value)) if isinstance(value, list) else str(value)
        if value is None or action.dest in ("help", "local_rank") or action.default in (value, text):
            continue
        bare = action.nargs == 0 or (action.nargs == "?" and value is action.const)
        words.append(action.option_strings[0] if bare else f"{action.option_strings[0]}={text}")
    return words


def add_files(parser) -> None:
    add = parser.add_argument_group("model and data").add_argument
    add("--do_train", action="store_true", help="train; required unless --dry_run is given")
    add("--dry_run", action="store_true", help="instead of training, check everything and report what the run will "
        "take: steps, memory, disk, and time from two timed steps; writes nothing")
    add("--input_dir", required=True, nargs="+", type=path_or_url, action=DataSets, metavar="DIR",
        help="folder (or s3:// prefix) of HDF5 shards, packed or not; or a mixture of several, each as "
        "NAME=DIR:WEIGHT, which is its share of the micro-batches")
    add("--shard_cache_gb", type=positive_float, metavar="GB", help="disk that the local copies of remote shards may "
        "take on each server, in BERT_CACHE_DIR (default: nine tenths of what is free)")
    add("--config_file", help="model config, JSON (default: that of the checkpoint which the run starts from)")
    add("--output_dir", type=path_or_s3, required=True, help="folder (or s3:// prefix) of the checkpoints")
    add("--bert_model", type=free_text, default="bert-large-uncased", help="name in the log and the model card")
    add("--init_checkpoint", type=path_or_url, help="start at step 0 from the weights of this checkpoint (path or "
        "URL; with --resume_from_checkpoint also its optimizer moments) or Hugging Face folder of a "
        "BertForPreTraining, BertForMaskedLM or BertModel, whose missing parts start fresh")
    add("--whole_word_mask", action="store_true", help="for rows without masks (--dynamic_masking): mask whole words, "
        "a token and the ## pieces that follow it; needless where the rows were made with the flag of that name")
    add("--seed", type=whole, default=42, help="random seed for weights, row order and dropout")


def add_batches(parser) -> None:
    add = parser.add_argument_group("batches").add_argument
    add("--max_seq_length", type=positive_int, help="tokens in a row (default: as in the shards, which it must equal)")
    add("--max_predictions_per_seq", type=positive_int,
        help="maximum number of masked tokens in a sequence (default: that of the shards, its smallest value)")
    add("--train_batch_size", type=positive_int, default=32,
        help="sequences per card and optimizer step, over all accumulation steps")
    add("--gradient_accumulation_steps", type=positive_int, default=1, help="micro-batches per optimizer step; must "
        "divide --train_batch_size.  On packed data it is divided by the average number of sequences in a row.  The "
        "loss is the mean of the micro-batches' means, so it depends on how rows fall into them: see --normalize_loss")
    add("--normalize_loss", choices=("micro_batch", "tokens"), default="micro_batch",
        help="what weighs the same in the loss of a step: every micro-batch of every card, whatever its number of "
        "masked tokens, as in the reference scripts (default); or every masked token, and in the NSP loss every "
        "sequence")


def add_schedule(parser) -> None:
    add = parser.add_argument_group("optimizer and schedule").add_argument
    add("--optimizer", choices=("lamb", "adamw"), default="lamb", help="lamb: for large batches, rates of 1e-3 to 1e-2 "
        "(default, the published recipe); adamw: PyTorch's fused AdamW, for batches of some hundred sequences, rates "
        "of 1e-4 to 1e-3.  Both with betas 0.9 and 0.999, and gradients clipped at a norm of 1")
    add("--weight_decay", type=float, default=0.01, help="of all weights but biases and LayerNorms (default: 0.01)")
    add("--learning_rate", type=float, default=5e-5, help="peak learning rate")
    add("--lr_schedule", choices=SCHEDULES, default="poly", help="how the rate falls after the warm-up: poly, with the "
        "square root of what is left (default, the published recipe); linear; cosine; constant, not at all; wsd, only "
        "in the last fifth (drawn in docs/training.md)")
    add("--max_steps", type=positive_int, help="optimizer steps of this phase: the length of its learning rate "
        f"schedule (default: what --num_train_epochs takes, else {DEFAULT_STEPS})")
    add("--num_train_epochs", type=positive_float, metavar="EPOCHS", help="length of this phase in passes over "
        "--input_dir, where --max_steps is not given")
    add("--steps_this_run", type=whole, default=-1,
        help="end the run at this step of the phase (a step number, not a count); -1 = --max_steps")
    add("--warmup_proportion", type=proportion, default=0.01,
        help="share of --max_steps over which the learning rate warms up")
    add("--undecayed_rate", type=positive_float, default=1.0, metavar="FACTOR", help="learning rate of biases and "
        "LayerNorms, as a multiple of the others': LAMB gives them no trust ratio, and 0.1 helps a small model")
    add("--phase2", action="store_true", help="second phase: continues from phase 1's last checkpoint in --output_dir "
        "with its own schedule; --resume_from_checkpoint need not be given, unless --init_checkpoint is")
    add("--phase1_end_step", type=whole, help="last step of phase 1 (default: 7038 where that checkpoint is in "
        "--output_dir, else what the checkpoints there say)")


def add_precision(parser) -> None:
    add = parser.add_argument_group("precision and memory").add_argument
    add("--hmp", "--autocast", "--use_autocast", **BOOLEAN, default=False, help="bf16 mixed precision")
    add("--hmp_bf16", default="", metavar="FILE", help="list of ops to run in bf16; '' = the device's own list")
    add("--hmp_fp32", default="", metavar="FILE", help="list of ops to run in fp32; '' = the device's own list")
    add("--hmp_opt_level", choices=("O1", "O2"), default="O1", help="O2 ignores the lists")
    add("--hmp_verbose", action="store_true", help="print the dtypes of each op once")
    add("--fp16", "--amp", action="store_true", help="fp16 mixed precision with loss scaling (CUDA)")
    add("--loss_scale", type=float, default=0, help="loss scale for --fp16; 0 means dynamic")
    add("--init_loss_scale", type=float, default=2.0**20, help="first value of a dynamic loss scale")
    add("--checkpoint_activations", action="store_true",
        help="gradient checkpointing: recompute the layers in the backward pass; less memory, more time")
    add("--mlm_loss_chunk", type=positive_int, default=0, metavar="SLOTS",
        help="compute the masked-LM loss in chunks of this many masked tokens, recomputing the logits in the backward "
        "pass: less memory, slightly more time (default: no chunks)")


def add_device(parser) -> None:
    add_device_choice(parser)
    add = parser.add_argument_group("how the device computes").add_argument
    add("--use_torch_compile", action="store_true", help="compile the model and the optimizer step (HPU: hpu_backend); "
        "where that does not work, the run logs the reason and continues without")
    add("--no_compiled_autograd", action="store_true", help="HPU, with --use_torch_compile: compile the backward "
        "pass without compiled autograd")
    add("--use_hpu_graphs", **BOOLEAN, default=False, help="HPU, lazy mode: record the graphs of forward and backward "
        "passes once and replay them: less work for the host, so faster where micro-batches are small")
    add("--cuda_graphs", action="store_true", help="CUDA, with --use_torch_compile: record the compiled parts as CUDA "
        "graphs and replay them; faster where micro-batches are small")
    add("--attention", choices=("plain", "sdpa", "varlen"),
        help="plain: elementary operations; sdpa: fused kernels with a mask; varlen: fused kernels for variable-length "
        "sequences (default: the fastest on the device; CUDA measures the last two at the start)")
    add("--use_cpu_kernels", **BOOLEAN, default=True,
        help="CPU, fp32: run the layers in kernels that are compiled (C++) when the run starts (default: True; where "
        "they cannot be used, the run logs why and uses PyTorch's operations)")
    add("--use_fused_lamb", action="store_true",
        help="use the device's fused LAMB, if it has one; on a CPU, one compiled kernel.  Gaudi's cannot skip a step "
        "that is not finite: it gets gradients of zero")


def add_device_choice(parser) -> None:
    add = parser.add_argument_group("device (default: CUDA where there is a GPU, else CPU)").add_argument
    add("--use_habana", action="store_true", help="run on HPU; an error if no HPU can be used")
    add("--use_lazy_mode", **BOOLEAN, help="HPU: lazy mode with mark_step; False = eager or "
        "compiled (default: True, unless PT_HPU_LAZY_MODE or --use_torch_compile says otherwise)")
    add("--no_cuda", action="store_true", help="use the CPU even if there is a GPU")
    add("--use_torch_lazy", action="store_true",
        help="PyTorch's own lazy tensors, to check a change against lazy mode without Gaudi")


def add_many_cards(parser) -> None:
    add = parser.add_argument_group("many cards").add_argument
    add("--local_rank", type=whole, help="card of this process on its server (default: LOCAL_RANK)")
    add("--allreduce_post_accumulation", action="store_true",
        help="one flat all-reduce after the last micro-batch, in place of DDP")
    add("--allreduce_post_accumulation_fp16", action="store_true", help="the same, with the gradients sent in "
        "16 bits")
    add("--use_zero_optimizer", **BOOLEAN, default=False,
        help="ZeRO: shard the optimizer state over the cards")
    add("--collective_timeout", type=positive_int, default=600, metavar="SECONDS",
        help="how long a rank waits for another before the run ends with an error")


def add_checkpoints(parser) -> None:
    add = parser.add_argument_group("checkpoints, faults and evaluation").add_argument
    add("--resume_from_checkpoint", action="store_true", help="resume from a checkpoint in --output_dir")
    add("--resume_step", type=whole, default=-1,
        help="the checkpoint to resume from, by the number in its name; -1 = the newest complete one")
    add("--num_steps_per_checkpoint", type=positive_int, default=100,
        help="steps between checkpoints; one is always written after the last step")
    add("--skip_checkpoint", action="store_true", help="do not write checkpoints")
    add("--stopped_exit_code", type=whole, default=0, metavar="CODE", help="exit code of a run that a signal has ended "
        "before its last step, with a checkpoint; another than 0 tells whoever started it to start it again")
    add("--max_skipped_steps", type=positive_int, default=10, help="end the run after this many skipped steps in a row "
        "(a step is skipped when its loss or gradient norm is not finite)")
    add("--skip_bad_shards", action="store_true", help="continue without a training shard that cannot be read or holds "
        "impossible values; without this flag it ends the run")
    add("--eval_dir", type=path_or_url, help="folder of held-out shards (packed, or with 'test' in the name)")
    add("--eval_freq", type=whole, default=0, help="steps between evaluations; 0 = only at the end")
    add("--early_stopping", type=positive_int, metavar="N", help="end the run after N evaluations without a new lowest "
        "held-out MLM loss; the checkpoint of the lowest one is kept")


def add_log(parser) -> None:
    add = parser.add_argument_group("log").add_argument
    add("--log_freq", type=positive_int, default=1, help="optimizer steps between log lines")
    add("--json_summary", type=path_or_s3, default="results/dllogger.json",
        help="log file (or s3:// object); its folder is created")
    add("--tensorboard_logdir", metavar="DIR",
        help="also write the figures, and the traces of --profile, for TensorBoard to this folder; needs the package "
        "tensorboard")
    add("--enable_tensorboard_logging", **BOOLEAN, default=False,
        help=f"the same, to {FIRST_WORKER}/ in --output_dir where no --tensorboard_logdir is given")
    add("--dllogger_console", action="store_true",
        help="also print each line of the log file, in the form of dllogger: DLL TIME - STEP KEY : VALUE …")
    add("--disable_progress_bar", action="store_true", help="no progress bar")
    add("--peak_tflops", type=float, default=0, help="peak TFLOP/s of one card, for the logged utilization (MFU); 0 = "
        "measured at the start by a matmul (CPU, CUDA), not logged on other devices")
    add("--profile", **BOOLEAN, default=False,
        help="write a torch.profiler trace beside the log file, or to --tensorboard_logdir")
    add("--profile_steps", type=step_range, default="4:6", metavar="A:B",
        help="the optimizer steps of the phase to trace with --profile; A alone is one step, 0 the first one")


def add_accepted(parser) -> None:
    add = parser.add_argument_group("accepted for old command lines").add_argument
    add("--enable_packed_data_mode", **BOOLEAN,
        help="deprecated: the shards decide; if given, it must agree with them")
    add("--avg_seq_per_pack", type=float, help="deprecated, no effect: the data decides")
    add("--log_memory_usage", **BOOLEAN, default=False,
        help="no effect: the memory of CUDA and Gaudi cards stands in every log line")
    add("--use_env", action="store_true", help="no effect")


def device_options(args, use_torch_compile: bool = False) -> DeviceOptions:
    """The flags of add_device_choice as the value that devices/ takes."""
    return options_from(args, DeviceOptions, use_torch_compile=use_torch_compile)


def precision_options(args) -> PrecisionOptions:
    return PrecisionOptions(bf16=args.hmp, fp16=args.fp16, bf16_list=args.hmp_bf16, fp32_list=args.hmp_fp32,
                            opt_level=args.hmp_opt_level, verbose=args.hmp_verbose, loss_scale=args.loss_scale,
                            init_loss_scale=args.init_loss_scale)


def step_range(text: str) -> tuple[int, int]:
    """The value of a flag that names steps, both included: A:B or A,B; A alone is one step.  0 is the first step too.

        >>> step_range("3:5"), step_range("2"), step_range("0:0")
        ((3, 5), (2, 2), (1, 1))
    """
    first, separator, last = text.replace(",", ":").partition(":")
    last = last if separator else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not A or A:B, step numbers with A <= B")
    return max(1, int(first)), max(1, int(last))


def contradiction(args) -> str | None:
    """What is wrong with the flags together, or None."""
    if not args.do_train and not args.dry_run:
        return "give --do_train or --dry_run"
    if args.train_batch_size % args.gradient_accumulation_steps:
        return (f"--train_batch_size {args.train_batch_size} is not divisible by "
                f"--gradient_accumulation_steps {args.gradient_accumulation_steps}")
    try:
        parse_sources(args.input_dir)
    except UserError as error:
        return str(error)
    if args.max_steps is not None and (problem := contradiction_of_steps(args)):
        return problem
    if args.optimizer != "lamb" and args.use_fused_lamb:
        return f"--optimizer {args.optimizer} and --use_fused_lamb exclude each other"
    if args.optimizer == "lamb" and args.weight_decay == 0.0:
        return ("--weight_decay 0 makes Adam of LAMB, whose trust ratio is only for weights that decay: give "
                "--optimizer adamw, with a rate for it")
    if args.fp16 and args.hmp:
        return "--fp16 and --hmp exclude each other"
    if args.use_lazy_mode and args.use_torch_compile:
        return "--use_lazy_mode True and --use_torch_compile exclude each other"
    if args.use_torch_lazy and (args.use_habana or args.use_torch_compile or args.checkpoint_activations):
        return "--use_torch_lazy excludes --use_habana, --use_torch_compile and --checkpoint_activations"
    if args.attention == "varlen" and (args.use_habana or args.use_torch_lazy):
        return "--attention varlen is for CUDA and CPU, not for --use_habana or --use_torch_lazy"
    if args.cuda_graphs and (not args.use_torch_compile or args.no_cuda or args.use_habana):
        return "--cuda_graphs is for CUDA with --use_torch_compile"
    if args.use_hpu_graphs and (not args.use_habana or args.use_torch_compile or args.use_lazy_mode is False):
        return "--use_hpu_graphs is for --use_habana in lazy mode"
    if args.use_hpu_graphs and (args.checkpoint_activations or args.mlm_loss_chunk or args.eval_dir):
        return ("--use_hpu_graphs excludes --checkpoint_activations and --mlm_loss_chunk, which run parts of the model "
                "twice, and --eval_dir (evaluate.py evaluates checkpoints)")
    if args.resume_step != -1 and not args.resume_from_checkpoint:
        return f"--resume_step {args.resume_step} needs --resume_from_checkpoint"
    if args.stopped_exit_code > 255:
        return f"--stopped_exit_code {args.stopped_exit_code} is above 255"
    if args.phase2 and args.phase1_end_step is not None and args.phase1_end_step < 0:
        return f"--phase1_end_step {args.phase1_end_step} is below 0"
    if args.eval_freq and not args.eval_dir:
        return f"--eval_freq {args.eval_freq} needs --eval_dir"
    if args.profile and is_s3(args.json_summary) and not args.tensorboard_logdir:
        return "--profile with a --json_summary in object storage: name a --tensorboard_logdir here for the traces"
    if is_s3(args.output_dir) and args.enable_tensorboard_logging and is_s3(args.tensorboard_logdir):
        return "--enable_tensorboard_logging with an --output_dir in object storage: name a --tensorboard_logdir here"
    if args.early_stopping and (not args.eval_freq or args.skip_checkpoint):
        return "--early_stopping needs --eval_dir and --eval_freq, and excludes --skip_checkpoint"
    if not 0.0 < args.learning_rate < float("inf"):
        return f"--learning_rate {args.learning_rate} is not a number above 0"
    for name in ("seed", "eval_freq", "peak_tflops", "weight_decay"):
        if not 0.0 <= getattr(args, name) < float("inf"):
            return f"--{name} {getattr(args, name)} is not a number of at least 0"
    return None


def contradiction_of_steps(args) -> str | None:
    """What is wrong with the flags that name steps of a phase of --max_steps, or None."""
    if args.steps_this_run != -1 and not 1 <= args.steps_this_run <= args.max_steps:
        return f"--steps_this_run {args.steps_this_run} is neither -1 nor from 1 to --max_steps {args.max_steps}"
    last_step = args.max_steps if args.steps_this_run == -1 else args.steps_this_run
    if args.profile and args.profile_steps[1] > last_step:
        return f"--profile_steps {args.profile_steps[0]}:{args.profile_steps[1]}, but the run ends at step {last_step}"
    return None
