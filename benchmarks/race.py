"""Trainings in child processes that take turns: one segment each, over and over, until each has finished."""

import json
import subprocess
import sys
from collections import deque
from dataclasses import dataclass, field

from tqdm import tqdm

from measuring import ROOT  # puts the repository's root on the path

# isort: split
from common.errors import UserError
from segmented_training import READY, REPORT

BAR = "{desc}: {percentage:3.0f}%|{bar:20}| {n:.0f} of at most {total:.0f} s [{elapsed}<{remaining}{postfix}]"


@dataclass
class Contestant:
    """A training of segmented_training.py, and its reports so far."""

    name: str
    kind: str  # "ours" or "transformers"
    settings: list | dict
    points: list[dict] = field(default_factory=list)
    child: subprocess.Popen | None = None

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "segmented_training.py"), self.kind,
                   json.dumps(self.settings)]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                      encoding="utf-8", errors="replace")
        self.read_until(READY)

    def read_until(self, wanted: str) -> str:
        """What follows in the next line with this word.  UserError where the child ends before."""
        last_lines = deque(maxlen=3)
        for line in self.child.stdout:
            if wanted in line:
                return line.partition(wanted)[2]
            last_lines.append(line.strip())
        raise UserError(f"{self.name}: ended with exit code {self.child.wait()}: {' / '.join(last_lines)}")

    def train_segment(self) -> float:
        """Train up to the next report; the seconds that this took."""
        before = self.points[-1]["seconds"] if self.points else 0.0
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        self.points.append(json.loads(self.read_until(REPORT)))
        return self.points[-1]["seconds"] - before

    @property
    def last_step(self) -> int:
        """Of its schedule."""
        if self.kind == "transformers":
            return self.settings["steps"]
        return next(int(flag.partition("=")[2]) for flag in self.settings if flag.startswith("--max_steps="))

    def end(self) -> None:
        if self.child is None:
            return
        self.child.stdin.close()
        try:
            self.child.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child.stdout.close()


def race(contestants: list[Contestant], is_finished, limit: float, what: str) -> list[Contestant]:
    """Train all by turns until is_finished(contestant), the end of its schedule, or `limit` seconds; returns them."""
    with tqdm(total=limit * len(contestants), unit="s", desc=what, bar_format=BAR) as bar:
        try:
            for contestant in contestants:
                contestant.start()
            active = list(contestants)
            while active:
                for contestant in list(active):
                    bar.update(min(contestant.train_segment(), bar.total - bar.n))
                    last = contestant.points[-1]
                    bar.set_postfix_str(f"{contestant.name}: MLM loss {last['mlm_loss']:.3f}")
                    if is_finished(contestant) or last["step"] >= contestant.last_step or last["seconds"] >= limit:
                        active.remove(contestant)
                        contestant.end()
                        bar.total = bar.n + sum(limit - other.points[-1]["seconds"] if other.points else limit
                                                for other in active)
        finally:
            for contestant in contestants:
                contestant.end()
    return contestants


def seconds_at(points: list[dict], loss: float) -> float | None:
    """The seconds of training until the held-out MLM loss first reached `loss`, by linear interpolation; or None.

        >>> seconds_at([{"seconds": 2.0, "mlm_loss": 7.0}, {"seconds": 4.0, "mlm_loss": 6.0}], 6.5)
        3.0
    """
    before = None
    for point in points:
        if point["mlm_loss"] <= loss:
            if before is None:
                return point["seconds"]
            share = (before["mlm_loss"] - loss) / (before["mlm_loss"] - point["mlm_loss"])
            return before["seconds"] + share * (point["seconds"] - before["seconds"])
        before = point
    return None
