"""The checks on one card.  No torch here."""

import shutil
from pathlib import Path

from scripts.smoke.runs import (
    LISTS,
    LONG_LENGTH,
    LONG_PREDICTIONS,
    MODES,
    SEQUENCE_LENGTH,
    STEPS,
    WARM_UP,
    LoggedRun,
    Report,
    Runs,
    error_line,
)

# The largest difference of a step's loss that passes, as a fraction of how far the losses fall.  Devices differ by more
# than rounding: HPU's GELU is the tanh approximation.
BETWEEN_DEVICES, BETWEEN_OPTIMIZERS, BETWEEN_PRECISIONS, BETWEEN_STARTS = 2e-2, 1e-3, 5e-2, 1e-3
SAVED_AT = STEPS // 2
LAZY = MODES["lazy"]


def check_software(runs: Runs, report: Report) -> int:
    """Print releases and signatures; returns the number of cards."""
    done = runs.ask("software")
    if done.returncode:
        report.line(False, "software", error_line(done))
        return 0
    for line in done.stdout.splitlines():
        name, _, value = line.partition(": ")
        if name in ("releases", "signature"):
            report.note(name, value)
    cards = int(done.stdout.split("cards: ")[-1].split()[0])
    report.line(cards > 0, "cards", str(cards))
    return cards


def check_modes(runs: Runs, report: Report) -> None:
    """The losses of every mode against the CPU's; graphs, fallbacks and the share of host time in lazy mode."""
    cpu = runs.train("cpu", "--no_cuda")
    lazy = runs.on_hpu("lazy", *LAZY)
    report.compare("losses on hpu, lazy mode, against cpu", lazy, cpu, BETWEEN_DEVICES)
    check_graphs(lazy, report)
    for name, flags in (("lazy with HPU graphs", [*LAZY, "--use_hpu_graphs"]), ("eager", MODES["eager"]),
                        ("compiled", MODES["compiled"]),
                        ("compiled without compiled autograd", [*MODES["compiled"], "--no_compiled_autograd"])):
        run = runs.on_hpu(name.replace(" ", "_"), *flags)
        report.compare(f"losses on hpu, {name}, against cpu", run, cpu, BETWEEN_DEVICES)
    fused = runs.on_hpu("fused_lamb", *LAZY, "--use_fused_lamb")
    report.compare("FusedLamb against NVLAMB", fused, lazy, BETWEEN_OPTIMIZERS)
    lists = runs.on_hpu("op_lists", *LAZY, *LISTS)
    report.compare("bf16 op lists against fp32", lists, lazy, BETWEEN_PRECISIONS, least=1e-6)  # less: no op was cast


def check_graphs(run: LoggedRun, report: Report) -> None:
    if run.problem:
        return report.line(False, "graphs and fallbacks", run.problem)
    settled, last = run.lines[WARM_UP - 1], run.lines[-1]
    compiled = last["graph_compilation"] - settled["graph_compilation"]
    fallbacks = last["cpu_fallback"] / STEPS
    report.line(compiled == 0, f"graphs compiled after step {WARM_UP}", f"{compiled / (STEPS - WARM_UP):g} a step")
    return report.line(fallbacks == 0, "ops that ran on the host",
                       f"{fallbacks:g} a step {last['cpu_fallback_ops']}".rstrip())


def check_checkpoints(runs: Runs, report: Report) -> None:
    """A checkpoint of each mode continues in each; a resumed run with dropout has the losses of one that never stopped.
    """
    whole = {mode: runs.on_hpu(f"saved_{mode}", *flags, f"--num_steps_per_checkpoint={SAVED_AT}", checkpoint=True)
             for mode, flags in MODES.items()}
    for writer, uninterrupted in whole.items():
        for reader, flags in MODES.items():
            if reader != writer:
                resumed = resume(runs, f"saved_{writer}", f"{writer}_to_{reader}", *flags)
                report.compare(f"saved in mode {writer}, continued in mode {reader}", resumed, uninterrupted,
                               BETWEEN_DEVICES)
    flags = [*LAZY, f"--config_file={runs.folder / 'dropout.json'}"]
    uninterrupted = runs.on_hpu("dropout", *flags, f"--num_steps_per_checkpoint={SAVED_AT}", checkpoint=True)
    resumed = resume(runs, "dropout", "dropout_resumed", *flags)
    report.compare("resumed with dropout against uninterrupted", resumed, uninterrupted, BETWEEN_STARTS)


def resume(runs: Runs, saved: str, name: str, *flags: str) -> LoggedRun:
    """Continue a copy of a finished run from its checkpoint in the middle."""
    source, target = runs.folder / saved / f"ckpt_{SAVED_AT}.pt", runs.folder / name
    if not source.exists():
        return LoggedRun(f"{source} was not written")
    target.mkdir(exist_ok=True)
    shutil.copy(source, target)
    return runs.on_hpu(name, *flags, "--resume_from_checkpoint")


def check_recipe_cache(runs: Runs, report: Report) -> None:
    """A second start reads the graphs that the first one compiled."""
    cache = runs.folder / "recipe_cache"
    first, second = (runs.on_hpu(name, *LAZY, PT_HPU_RECIPE_CACHE_CONFIG=f"{cache},False,1024")
                     for name in ("cache_first", "cache_second"))
    problem = first.problem or second.problem
    if problem:
        return report.line(False, "second start with the recipe cache", problem)
    files = sum(path.is_file() for path in cache.rglob("*"))
    return report.line(files > 0 and second.losses == first.losses, "second start with the recipe cache",
                       f"{second.seconds_to_first_step:.1f} s to the first step, {first.seconds_to_first_step:.1f} s "
                       f"before; {files} files in the cache; "
                       f"{'the same' if second.losses == first.losses else 'other'} losses")


def time_modes(runs: Runs, report: Report, config: Path, batch: int) -> None:
    """Seconds per step of the real model with the recipe's flags, in every mode."""
    for name, flags in (("lazy", LAZY), ("lazy with HPU graphs", [*LAZY, "--use_hpu_graphs"]),
                        ("compiled", [*MODES["compiled"], "--no_compiled_autograd"]),
                        ("compiled with compiled autograd", MODES["compiled"])):
        run = runs.on_hpu(f"timed_{name}".replace(" ", "_"), *flags, *LISTS, "--use_fused_lamb",
                          f"--config_file={config}", f"--train_batch_size={batch}", f"--log_freq={STEPS // 2}")
        claim = f"{config.name}, {batch} × {SEQUENCE_LENGTH} tokens, bf16, {name}"
        if run.problem:
            report.line(False, claim, run.problem)
            continue
        last = run.lines[-1]  # averages over the second half of the steps: the first half compiles graphs
        report.line(True, claim, f"{last['step_time']:.3f} s a step, "
                    f"{last['sequences_per_second']:.1f} sequences/s, host busy {last['host_time_share']:.0%} of the "
                    f"time, {last['graph_compilation']} graphs, {memory(last)}")


def check_shapes(runs: Runs, report: Report, config: Path) -> None:
    """Real shapes for a few steps: does the memory suffice, and how much is used?"""
    for rows in (8, 16):
        for form in ("data_512", "packed_512"):
            run = runs.on_hpu(f"shape_{rows}_{form}", *LAZY, *LISTS, "--use_fused_lamb", f"--config_file={config}",
                              f"--input_dir={runs.folder / form}", f"--max_seq_length={LONG_LENGTH}",
                              f"--max_predictions_per_seq={LONG_PREDICTIONS}", f"--train_batch_size={rows * 4}",
                              "--gradient_accumulation_steps=4", "--max_steps=3")
            claim = (f"{config.name}, micro-batches of {rows} × {LONG_LENGTH} tokens, "
                     f"{'packed' if 'packed' in form else 'unpacked'}")
            report.line(run.problem is None, claim, run.problem or memory(run.lines[-1]))


def memory(line: dict) -> str:
    return f"peak memory {line['max_memory_allocated'] / 1e9:.2f} GB"
