"""The signals that ask a run to stop, and the vote by which all ranks stop after the same step.

A signal may reach one rank only, or the ranks at different moments; a rank that continued would wait in a collective
for those that have stopped.  So the ranks vote once a step, and stop if any of them has received a signal.  The vote is
an all-reduce between the hosts during the step's computation: nothing waits for the device, and no rank waits longer
than the time-out of the collectives.
"""

import os
import signal
import time
from contextlib import contextmanager

import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # mpirun forwards SIGUSR1, but kills after a SIGTERM
ECHO_SECONDS = 2.0  # within this time, a launcher may forward a signal that has reached the process already


class StopVote:
    """Whether any rank wants to stop, asked once a step."""

    def __init__(self, ranks):
        self.ranks = ranks
        self.stop = torch.zeros((), dtype=torch.int32)
        self.work = None

    def start(self, stop: bool) -> None:
        """Begin the step's vote with this rank's answer."""
        self.stop = torch.tensor(int(stop), dtype=torch.int32)
        self.work = self.ranks.start_maximum(self.stop)

    def result(self) -> bool:
        """Wait for the vote that was started last: True on all ranks if any answered True."""
        if self.work is not None:
            self.work.wait()
        return bool(self.stop)


class StopSignals:
    """Records that a signal asked this process to stop.  A second signal has its default effect, at once."""

    def __init__(self):
        self.name: str | None = None  # of the signal received
        self.received_at = 0.0

    @property
    def received(self) -> bool:
        return self.name is not None

    @contextmanager
    def listening(self):
        """A block in which STOP_SIGNALS are recorded; their former handlers are restored at its end."""
        before = {number: signal.signal(number, self.receive) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if not self.received:
            self.name, self.received_at = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.received_at > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
