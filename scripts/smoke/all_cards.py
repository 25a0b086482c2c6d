"""The checks on all cards of a server, with each launcher.  No torch here."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

from scripts.smoke.one_card import memory
from scripts.smoke.runs import LISTS, MODES, ROOT, LoggedRun, Report, Runs, environment, error_line, launchers

BETWEEN_RANKS, IN_16_BITS = 1e-3, 5e-2  # as in one_card.py
SECONDS_TO_START, SECONDS_TO_END = 600, 60
TOKEN = "SMOKE_TEST_RUN"  # in the environment of the ranks, by which they are found

REDUCTIONS = {
    "flat all-reduce": (["--allreduce_post_accumulation"], BETWEEN_RANKS),
    "16 bits on the wire": (["--allreduce_post_accumulation", "--allreduce_post_accumulation_fp16"], IN_16_BITS),
    **{f"DDP, {mode}": (flags, BETWEEN_RANKS) for mode, flags in MODES.items()},
    "ZeRO, FusedLamb": (["--allreduce_post_accumulation", "--use_zero_optimizer=True", "--use_fused_lamb"],
                        BETWEEN_RANKS),
    "checkpoint_activations": (["--allreduce_post_accumulation", "--checkpoint_activations"], BETWEEN_RANKS),
    "FusedLamb, bf16 op lists": (["--allreduce_post_accumulation", "--use_fused_lamb", *LISTS], IN_16_BITS),
}


def check_all_cards(runs: Runs, report: Report, cards: int, chosen: list[str]) -> None:
    """Training on all cards, by the chosen launchers, against one card with the same global batch; what it rests on."""
    if cards == 1:
        return report.note("all cards", "there is one card only")
    alone = runs.on_hpu("one_card", *MODES["lazy"], f"--train_batch_size={2 * cards}",
                        f"--gradient_accumulation_steps={cards}")
    for name in chosen:
        launcher = launchers(cards)[name]
        if launcher is None:
            report.note(name, "not found here")
            continue
        check_collectives(runs, report, name, launcher, cards)
        for reduction, (flags, limit) in REDUCTIONS.items():
            mode = [] if flags in MODES.values() else MODES["lazy"]
            run = runs.on_hpu(f"all_cards_{name}_{reduction}".replace(" ", "_").replace(",", ""), *mode, *flags,
                              "--train_batch_size=2", "--gradient_accumulation_steps=1", launcher=launcher)
            report.compare(f"{cards} cards over {name} against one, {reduction}", run, alone, limit)
        check_killed_rank(runs, report, name, launcher)
    return None


def check_collectives(runs: Runs, report: Report, name: str, launcher: list[str], cards: int) -> None:
    reduced = runs.ask("all_reduce", launcher)
    found = re.findall(r"on card (\S+): all-reduce is right", reduced.stdout)
    report.line(reduced.returncode == 0 and len(set(found)) == cards, f"all-reduce over {cards} cards, {name}",
                f"right on every rank, cards (HLS_MODULE_ID) {' '.join(sorted(found))}" if not reduced.returncode
                else error_line(reduced))
    dropped = runs.ask("dropout", launcher)
    masks = re.findall(r"keep rate (\S+), mask (\d+)", dropped.stdout)
    report.line(dropped.returncode == 0 and len({mask for _, mask in masks}) == cards, f"dropout's masks, {name}",
                f"each rank has its own; keep rates {' '.join(rate for rate, _ in masks)}" if not dropped.returncode
                else error_line(dropped))


def check_killed_rank(runs: Runs, report: Report, name: str, launcher: list[str]) -> None:
    """After one rank is killed, no process of the run is left."""
    claim, token = f"a killed rank leaves no process, {name}", f"{name}_{os.getpid()}"
    output = runs.folder / f"killed_{name}.txt"
    command = runs.command(f"killed_{name}", "--use_habana", *MODES["lazy"], "--allreduce_post_accumulation",
                           "--train_batch_size=2", "--gradient_accumulation_steps=1", "--max_steps=100000",
                           "--skip_checkpoint", launcher=launcher)
    with open(output, "w", encoding="utf-8") as file:
        job = subprocess.Popen(command, cwd=ROOT, env=environment(**{TOKEN: token}), stdout=file, stderr=file,
                               stdin=subprocess.DEVNULL)
    try:
        if not wait_until(lambda: "step 2 " in output.read_text(encoding="utf-8") or job.poll() is not None,
                          SECONDS_TO_START):
            return report.line(False, claim, f"no step within {SECONDS_TO_START} s, see {output}")
        ranks = [pid for pid in processes(token) if "1" in rank_of(pid)]
        if not ranks:
            return report.line(False, claim, f"rank 1 did not run, see {output}")
        os.kill(ranks[0], signal.SIGKILL)
        began = time.monotonic()
        ended = wait_until(lambda: job.poll() is not None and not processes(token), SECONDS_TO_END)
        left = len(processes(token))
        return report.line(ended, claim, f"all ended within {time.monotonic() - began:.0f} s" if ended
                           else f"{left} processes are left after {SECONDS_TO_END} s")
    finally:
        for pid in processes(token):
            os.kill(pid, signal.SIGKILL)


def wait_until(condition, seconds: float) -> bool:
    give_up = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.2)
    return True


def processes(token: str) -> list[int]:
    """The processes with this token in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"{TOKEN}={token}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # ended meanwhile, or of another user
            continue
    return found


def rank_of(pid: int) -> list[str]:
    """The ranks that a process's environment names."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []
    return [value for variable in variables for name, _, value in [variable.partition("=")]
            if name in ("RANK", "OMPI_COMM_WORLD_RANK")]


def check_large_model(runs: Runs, report: Report, config: Path, cards: int) -> None:
    """1.2 billion parameters for three steps, its optimizer state sharded over all cards."""
    launcher = next((found for found in launchers(cards).values() if found), None)
    sharded = ["--use_zero_optimizer=True", "--allreduce_post_accumulation", "--allreduce_post_accumulation_fp16"]
    options = {"launcher": launcher} if cards > 1 and launcher else {}
    run: LoggedRun = runs.on_hpu("large_model", *MODES["lazy"], *LISTS, "--use_fused_lamb", f"--config_file={config}",
                                 "--train_batch_size=16", "--max_steps=3", *(sharded if options else []), **options)
    claim = f"{config.name} on {cards if options else 1} cards for three steps"
    report.line(run.problem is None, claim, run.problem or memory(run.lines[-1]))
