"""What the PARAMETER line of a log says beside the flags: batch, cards, software, machine.  No torch here."""

import os
import platform
from dataclasses import asdict
from pathlib import Path


def run_record(*, config, device, world_size: int, plan, descriptions: dict[str, str]) -> dict:
    """The record of a run on `world_size` cards; `plan` is its BatchPlan.  Empty descriptions are left out."""
    return {
        "config": vars(config), "device": device.describe(), "world_size": world_size, "batch_plan": asdict(plan),
        "software": {"Python": platform.python_version(), **device.software()}, "machine": host_description(),
        "descriptions": {name: text for name, text in descriptions.items() if text},
    }


def reference_record(args, plan) -> dict:
    """What the reference scripts log of a start besides the learning rate, under their names."""
    return {"Config": [str(args)], "SEED": args.seed, "train_start": True, "batch_size_per_pu": plan.micro_batch_size}


def host_description() -> dict[str, str | int]:
    """The host of this process, without its name."""
    return {"system": f"{platform.system()} {platform.release()}", "processor": processor_name(),
            "cores": os.cpu_count() or 1}


def processor_name() -> str:
    """The processor's name where Linux knows it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()
