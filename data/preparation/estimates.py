"""Estimates of what the stages take, from the size of what they read.

The rates are cautious: lower than what one core of a cloud machine reached when benchmarks/README.md was measured.
They scale with the number of processes until the one process that reads and writes is the limit (MAIN_RATES).
"""

import shutil
from pathlib import Path

from common.cli import format_bytes, format_duration
from common.files import nearest_existing
from data.preparation import archives
from data.preparation.samples import SampleOptions

# MB of input (XML, text, text) that one process handles in a second
RATES = {"text_formatting": 7.0, "sharding": 4.5, "create_hdf5_files": 4.0}
MAIN_RATES = {"text_formatting": 400.0, "sharding": 150.0, "create_hdf5_files": float("inf")}
BZ2 = 4.0  # MB of XML in a MB of a compressed dump
ROWS, MASKS = 0.45, 0.09  # bytes of compressed HDF5 for each byte of text and each pass over it


def hdf5_share(samples: SampleOptions) -> float:
    """Bytes of HDF5 shards for each byte of text.  Measured on the sample; max_seq_length makes little difference."""
    return samples.dupe_factor * (ROWS if samples.dynamic_masking else ROWS + MASKS)


def estimated_duration(stage: str, size: float, workers: int) -> str:
    """How long a stage that reads `size` bytes will take."""
    return format_duration(max(1, round(size / 1e6 / min(RATES[stage] * workers, MAIN_RATES[stage]))))


def announcement(stage: str, size: float, written: float, pool, folder: Path) -> str:
    free = shutil.disk_usage(nearest_existing(folder)).free
    return (f"{stage}: {format_bytes(size)} to read, about {estimated_duration(stage, size, pool.workers)} with "
            f"{pool.description}; writes about {format_bytes(written)} ({format_bytes(free)} free)")


def whole_chain(parts, samples: SampleOptions, workers: int) -> list[str]:
    """A line for each stage of the preparation, with create_hdf5_files for both phases."""
    compressed = sum(part.download_bytes for part in parts)
    text = sum(part.download_bytes * BZ2 * part.text_share for part in parts)
    hdf5 = ("create_hdf5_files", text, text * hdf5_share(samples))
    lines = [f"download            {format_bytes(compressed):>8}  as fast as the network is"]
    for stage, size, written in (("text_formatting", compressed * BZ2, text), ("sharding", text, text), hdf5, hdf5):
        lines.append(f"{stage:<18}  {format_bytes(written):>8}  about {estimated_duration(stage, size, workers)}")
    return lines


def input_size(paths) -> float:
    """The size of the files in bytes, that of compressed dumps after decompression."""
    return sum(path.stat().st_size * (BZ2 if archives.compression(path) else 1) for path in paths)
