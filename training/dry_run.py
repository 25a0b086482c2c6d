"""run_pretraining.py --dry_run: what a run takes, and every problem that can be found beforehand.  Writes nothing.

The run is put together as for training.  Then every row of all shards is checked, the folders and the disk are checked,
the memory is estimated (memory_estimate.py), and three steps run on real batches, of which two are timed.
"""

import os
import shutil
import time
from contextlib import closing
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint.folder import saved_steps
from checkpoint.rotation import KEPT
from common.cli import format_bytes, format_duration
from common.errors import UserError, first_line
from common.files import nearest_existing
from common.object_store import is_s3
from data.dataloader import batches_once, in_pieces
from data.row_checks import read_checked_rows
from devices.device import proc_bytes
from training import memory_estimate
from training.evaluation import shown_mask_id

MOMENTS = 2  # numbers that the optimizer keeps for each weight
TIMED_STEPS = 2  # after one that is not


def dry_run(trainer) -> dict[str, float]:
    """Check and measure the run of a Trainer, print what is found, and return the figures.

    Raises UserError at the first thing that would stop the run.
    """
    steps = max(0, trainer.last_step - trainer.first_step)
    figures = {"steps": steps, "steps_per_epoch": steps_per_epoch(trainer, count_usable_rows(trainer), steps),
               "checkpoint_bytes": check_disk(trainer, steps), "estimated_memory": check_memory(trainer)}
    try:
        figures |= measure_time(trainer, steps)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{first_line(error)}: {less_memory(trainer.args)}") from None
    figures["memory"] = measured_memory(trainer)
    return figures


def count_usable_rows(trainer) -> int:
    """Check every row of every shard, which a training run does when the shard's turn comes; how many it can use."""
    hidden = trainer.args.disable_progress_bar or not trainer.ranks.first or None
    held_out = in_pieces(trainer.evaluator.shards) if trainer.evaluator else []
    usable, stream = 0, trainer.stream
    training = [piece for number, piece in enumerate(stream.pieces) if number not in stream.skipped_shards]
    for shard in tqdm([*held_out, *training], unit="shard", desc="checking rows", disable=hidden, leave=False):
        try:
            stream.reader.call(read_checked_rows, shard, trainer.model.config.vocab_size)
            usable += shard.rows if shard in training else 0
        except UserError as error:
            if not trainer.args.skip_bad_shards or shard in held_out:
                raise
            trainer.log.warn(f"would be skipped: {error}")
    if not usable:
        raise UserError(f"--input_dir {trainer.args.input_dir}: no shard in it can be used")
    return usable


def steps_per_epoch(trainer, rows: int, steps: int) -> float:
    """How many optimizer steps use `rows` rows once."""
    rows_per_step = trainer.plan.rows * trainer.ranks.world_size
    trainer.log.print(f"epoch: {rows:,} rows / {rows_per_step:,} rows a step of all ranks = "
                      f"{rows / rows_per_step:,.1f} steps; the {steps:,} steps of this run are "
                      f"{steps * rows_per_step / rows:,.2f} epochs")
    return rows / rows_per_step


def check_disk(trainer, steps: int) -> int:
    """The most bytes that the checkpoints take at a time.  UserError where the run could not write them, or its log."""
    args = trainer.args
    log_file = Path(os.devnull if is_s3(args.json_summary) else args.json_summary)
    for flag, folder in (("--output_dir", trainer.folder), ("--json_summary", log_file.parent),
                         ("--tensorboard_logdir", args.tensorboard_logdir)):
        existing = nearest_existing(folder) if folder else None
        if existing and not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
            raise UserError(f"{flag}: {existing} is not a writable folder")
    if log_file.exists() and not is_s3(args.json_summary) and not (log_file.is_file() and os.access(log_file, os.W_OK)):
        raise UserError(f"--json_summary {log_file}: not a writable file")
    needed = checkpoint_bytes(args, trainer.folder, steps, memory_estimate.bytes_of(trainer.model))
    older = sum(path.stat().st_size for pattern in ("ckpt_*.pt", "ckpt_*.optim/*")
                for path in Path(trainer.folder).glob(pattern))
    free = shutil.disk_usage(nearest_existing(trainer.folder)).free
    present = f"{format_bytes(free)} are free" + (f" and {format_bytes(older)} taken by older ones" if older else "")
    trainer.log.print(f"disk: checkpoints take up to {format_bytes(needed)} in {args.output_dir}, where {present}")
    if needed > free + older:
        raise UserError(f"--output_dir {args.output_dir}: its checkpoints take {format_bytes(needed)}, but {present}")
    return needed


def checkpoint_bytes(args, folder, steps: int, weights: int) -> int:
    """Weights and moments, for the checkpoints that are kept and the one being written."""
    if args.skip_checkpoint:
        return 0
    present = saved_steps(folder)
    protected = int(args.phase2 and args.phase1_end_step in present)  # phase 1's last one stays
    written = -(-steps // args.num_steps_per_checkpoint)
    at_most = min(len(present) - protected + written, KEPT + 1) + protected
    return at_most * weights * (1 + MOMENTS)


def check_memory(trainer) -> int | None:
    """Estimate the bytes that this rank needs on its device: on a CPU, this process and those that read its shards.

    UserError where they are not available.  None where the device does not report its memory, where a compiler decides
    what is kept, and where the masked-LM loss is computed in chunks, whose number depends on the rows.
    """
    device, weights, batch = trainer.device, memory_estimate.bytes_of(trainer.model), trainer.first_batch()
    trainer.stream.finish_reading()  # the shards then count as held
    shards_grow = check_shards(trainer)
    held = device.held_memory()
    in_chunks = trainer.args.mlm_loss_chunk and not trainer.model.use_kernels
    if held is None or trainer.args.use_torch_compile or in_chunks:
        return None
    moments = MOMENTS * weights // (trainer.ranks.world_size if trainer.args.use_zero_optimizer else 1)
    exchange = weights if trainer.ranks.world_size > 1 else 0  # where gradients are collected for the other ranks
    step = memory_estimate.step_peak(trainer.model, trainer.precision, batch, trainer.plan.micro_batch_size,
                                     trainer.plan.accumulation_steps > 1)
    sharing = trainer.ranks.local_size if device.is_host else 1  # ranks that share the memory
    needed = held + moments + exchange + step + copies(trainer)
    available = held + device.free_memory() // sharing
    if device.is_host:
        needed += shards_grow + reader_peak(trainer)
        available += reader_bytes(trainer, "VmRSS")
    trainer.log.print(f"memory: about {format_bytes(needed)} estimated, {format_bytes(available)} available on "
                      f"{device.describe()}")
    if needed > available:
        raise UserError(f"a rank needs about {format_bytes(needed)} of memory, but {format_bytes(available)} are "
                        f"available: {less_memory(trainer.args)}")
    return needed


def check_shards(trainer) -> int:
    """Say what the shards take in the host's memory; the bytes of it that this process does not hold yet."""
    now, most = trainer.stream.memory()
    held_out = max((shard.nbytes for shard in in_pieces(trainer.evaluator.shards)), default=0) if trainer.evaluator \
        else 0
    trainer.log.print(f"shards: up to {format_bytes(most + held_out)} of rows in the memory of a rank's process, and "
                      f"{format_bytes(reader_peak(trainer))} in that of the process that reads them")
    return max(0, most - now) + held_out


def reader_peak(trainer) -> int:
    """The most bytes of the process that reads shards, which has read every shard before."""
    return reader_bytes(trainer, "VmHWM")


def reader_bytes(trainer, key: str) -> int:
    """One of the sizes that Linux gives of the process that reads shards; 0 where it does not."""
    child = trainer.stream.reader.child
    return child and proc_bytes(f"/proc/{child.pid}/status", key) or 0


def copies(trainer) -> int:
    """Bytes of the device's memory that a checkpoint is copied to before it is written."""
    if not trainer.device.is_host or trainer.args.skip_checkpoint:
        return 0
    return (1 + MOMENTS) * memory_estimate.bytes_of(trainer.model)


def measured_memory(trainer) -> int | None:
    """Bytes that this rank needs, from the peak of the timed steps; None where the device does not report it."""
    peak = trainer.device.peak_memory()
    if peak is None:
        return None
    copied, reading = copies(trainer), reader_peak(trainer) if trainer.device.is_host else 0
    needed = peak + copied + reading
    trainer.log.print(f"memory: {format_bytes(needed)} measured = {format_bytes(peak)} at the peak of the timed steps "
                      f"+ {format_bytes(copied)} for the copy that a checkpoint is written from"
                      + (f" + {format_bytes(reading)} for reading shards" if reading else ""))
    return needed


def less_memory(args) -> str:
    return (f"raise --gradient_accumulation_steps {args.gradient_accumulation_steps} (smaller micro-batches)"
            + ("" if args.checkpoint_activations else ", or give --checkpoint_activations"))


def measure_time(trainer, steps: int) -> dict[str, float]:
    """Run three steps and evaluate one batch: how long the run will take, in seconds."""
    timed = []
    for _ in range(1 + TIMED_STEPS):
        began = time.perf_counter()
        trainer.train_step(min(trainer.first_step + 1, trainer.args.max_steps))
        trainer.stop_vote.result()
        trainer.device.synchronize()
        timed.append(time.perf_counter() - began)
    step = sum(timed[1:]) / TIMED_STEPS
    evaluations = sum(trainer.is_due(number, trainer.args.eval_freq)
                      for number in range(trainer.first_step + 1, trainer.last_step + 1)) if trainer.evaluator else 0
    evaluating = evaluations * evaluation_seconds(trainer) if evaluations else 0.0
    total = steps * step + evaluating
    trainer.log.print(f"time: {format_duration(total)} = {steps:,} steps of {step:.3g} s"
                      + (f" + {evaluations} evaluations in {format_duration(evaluating)}" if evaluations else "")
                      + "; checkpoints are written at the same time")
    return {"seconds_per_step": step, "seconds": total}


@torch.no_grad()
def evaluation_seconds(trainer) -> float:
    """The time of one evaluation, from the second time that its first batch is evaluated."""
    trainer.model.eval()
    evaluator = trainer.evaluator
    rows = evaluator.batch_size
    with closing(batches_once(evaluator.shards, rows, trainer.model.config.vocab_size, evaluator.reader)) as batches:
        on_host = next(batches)
    batch, mask_id, frequencies = trainer.device.put(on_host), shown_mask_id(on_host), evaluator.context_free_model()
    for _ in range(2):
        began = time.perf_counter()
        evaluator.batch_sums(trainer.model, batch, frequencies, mask_id).tolist()
        seconds = time.perf_counter() - began
    trainer.model.train()
    return seconds * -(-sum(shard.rows for shard in evaluator.shards) // (rows * trainer.ranks.world_size))
