"""What the ranks of a run agree on once a step, and the signals that ask a run to stop.

A signal reaches one rank, or each at another moment; but all must stop after the same step, or some would wait in a
collective for ranks that have left.  So each step has a round of yes-or-no questions, and where any rank says yes, all
have the answer yes.  The round runs over a gloo group on the host beside the step's computation: no device is waited
for, and no rank waits longer than the group's time-out.

    agreement = Agreement(process, ("stop",))
    for step in …:
        agreement.ask(stop=signals.received)
        …                                       # the step
        if agreement.answers()["stop"]: …       # the same on all ranks
"""

import os
import signal
import time
from contextlib import contextmanager

import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # mpirun hands SIGUSR1 on, but kills after a SIGTERM
ECHO_SECONDS = 2.0  # a launcher repeats to its ranks what the terminal or the scheduler has sent them already


class Agreement:
    """One round of questions a step.  The questions, and their order, are the same on all ranks."""

    def __init__(self, process, questions: tuple[str, ...]):
        self.process = process
        self.questions = questions
        self.flags = torch.zeros(len(questions), dtype=torch.int32)
        self.round = None

    def ask(self, **said: bool) -> None:
        """Begin the step's round with what this rank says to each question."""
        self.flags = torch.tensor([int(said[question]) for question in self.questions], dtype=torch.int32)
        self.round = self.process.start_maximum(self.flags)

    def answers(self) -> dict[str, bool]:
        """The answer to each question of the round begun last: yes where any rank says so."""
        if self.round is not None:
            self.round.wait()
        return dict(zip(self.questions, map(bool, self.flags.tolist()), strict=True))


class StopSignals:
    """Remembers that a signal asked this process to stop.  A second one ends it at once, as if nobody listened."""

    def __init__(self):
        self.name: str | None = None  # of the signal that came
        self.came_at = 0.0

    @property
    def received(self) -> bool:
        return self.name is not None

    @contextmanager
    def listening(self):
        """A block in which the signals are remembered; before and after, they do what they did."""
        before = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if not self.received:
            self.name, self.came_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.came_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
