"""What the benchmarks share: alternating repeats, medians with their spread, and a description of the machine."""

import json
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # here for all benchmarks: each imports this file before the repository's modules


def alternate(functions: dict, repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each function, called in turn so that a slow moment of the machine meets all of them."""
    seconds = {name: [] for name in functions}
    for repeat in range(warm_up + repeats):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            if repeat >= warm_up:
                seconds[name].append(time.perf_counter() - began)
    return seconds


@contextmanager
def busy_processes(count: int):
    """A block beside which so many processes each want a whole core."""
    children = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of the repeats."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def machine(*packages: str) -> dict:
    """Where the figures were taken: processor, cores in use, versions."""
    import torch

    return {"processor": processor(), "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{package: version(package) for package in ("torch", *packages)}}


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def report(figures: dict, as_json: bool, lines: list[str]) -> None:
    """Print the figures as one JSON object, or as lines for people."""
    print(json.dumps(figures, indent=2) if as_json else "\n".join(lines))
    sys.stdout.flush()
