"""What the stages will take, estimated from the size of what they read.

The rates are cautious: below what one core of a cloud machine reached, at the time that benchmarks/README.md tells of.
They scale with the number of processes as long as the one process that reads and writes keeps up, which MAIN_RATES
bounds.
"""

import shutil
from pathlib import Path

from common.files import nearest_existing
from common.units import format_bytes, format_duration

# MB of input (XML, text, text) that one process gets through in a second, and what the stage writes for each MB of it
RATES = {"text_formatting": 3.0, "sharding": 4.5, "create_hdf5_files": 4.0}
MAIN_RATES = {"text_formatting": 400.0, "sharding": 150.0, "create_hdf5_files": float("inf")}
WRITES = {"text_formatting": 0.16, "sharding": 1.0, "create_hdf5_files": 3.0}
BZ2 = 4.0  # MB of XML in a MB of a compressed dump


def seconds(stage: str, size: float, workers: int) -> int:
    """Estimated duration of a stage that reads `size` bytes, in whole seconds."""
    return max(1, round(size / 1e6 / min(RATES[stage] * workers, MAIN_RATES[stage])))


def announcement(stage: str, size: float, pool, folder: Path) -> str:
    """One line: what the stage reads, how long that will take, what it writes and what is free there."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    return (f"{stage}: {format_bytes(size)} to read, about {format_duration(seconds(stage, size, pool.workers))} with "
            f"{pool.description}; writes about {format_bytes(size * WRITES[stage])} ({format_bytes(free)} free)")


def plan(dataset_size: float, workers: int) -> list[str]:
    """The whole chain on a compressed dump of this many bytes, a line for each stage."""
    xml = dataset_size * BZ2
    text = xml * WRITES["text_formatting"]
    lines = [f"download            {format_bytes(dataset_size):>8}  as fast as the network is"]
    for stage, size in (("text_formatting", xml), ("sharding", text), ("create_hdf5_files", text),
                        ("create_hdf5_files", text)):
        lines.append(f"{stage:<18}  {format_bytes(size * WRITES[stage]):>8}  about "
                     f"{format_duration(seconds(stage, size, workers))}")
    return lines


def input_size(paths) -> float:
    """The bytes in files, those of compressed dumps as if unpacked."""
    return sum(path.stat().st_size * (BZ2 if path.suffix in (".bz2", ".xz") else 1) for path in paths)
