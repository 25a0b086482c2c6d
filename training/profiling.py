"""A torch.profiler trace of some steps of a run (--profile, --profile_steps A:B), for chrome://tracing or Perfetto."""

from contextlib import contextmanager
from pathlib import Path

import torch

from common.files import replacing


class StepProfiler:
    """Records the steps of --profile_steps and writes the trace beside the log file, or to --tensorboard_logdir."""

    def __init__(self, args, device, rank: int, report):
        self.first, self.last = args.profile_steps if args.profile else (0, 0)
        self.device = device
        self.report = report
        name = f"trace_rank{rank}_steps{self.first}-{self.last}"
        self.path = (Path(args.tensorboard_logdir) / f"{name}.pt.trace.json" if args.tensorboard_logdir  # as it expects
                     else Path(args.json_summary).parent / f"{name}.json")
        self.profile: torch.profiler.profile | None = None

    @contextmanager
    def around(self, step: int):
        """Record the block, which is this training step, if the flags name it."""
        if self.first <= step <= self.last and self.profile is None:
            # Without shapes, because recording them makes PyTorch's lazy device build other graphs.
            self.profile = torch.profiler.profile(activities=self.device.profiler_activities())
            self.profile.start()
        yield
        if step == self.last and self.profile is not None:
            self.device.synchronize()
            self.profile.stop()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                self.profile.export_chrome_trace(str(temporary))
            self.report(f"profile of steps {self.first} to {self.last}: {self.path}")
