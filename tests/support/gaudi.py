"""Runs scripts with the stand-in for Gaudi's software in front, and reads its record."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
STANDIN = ROOT / "tests" / "gaudi_standin"


def environment(record: Path | None = None, release: str = "1.23", cards: int = 1, **more) -> dict[str, str]:
    """The environment of a process that finds the stand-in.  One thread: the models are tiny."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PT_HPU", "GAUDI_STANDIN"))}
    path = os.pathsep.join(filter(None, (str(STANDIN), os.environ.get("PYTHONPATH"))))
    told = {"GAUDI_STANDIN_RELEASE": release, "GAUDI_STANDIN_CARDS": str(cards)}
    if record:
        told["GAUDI_STANDIN_RECORD"] = str(record)
    return {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **told, **more}


def run(words, cwd=ROOT, **options) -> subprocess.CompletedProcess:
    """Run a script of this repository to its end, its output kept as text; `options` are those of environment()."""
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment(**options), text=True,
                          capture_output=True, timeout=300)


def calls(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def start(words, cwd=ROOT, **options) -> subprocess.Popen:
    """Start a process that finds the stand-in and the modules of this repository."""
    found = environment(**options)
    found["PYTHONPATH"] += os.pathsep + str(ROOT)
    return subprocess.Popen(words, cwd=cwd, env=found, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
