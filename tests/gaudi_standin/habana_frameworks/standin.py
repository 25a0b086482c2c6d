"""What the stand-in is told by the environment, and its record."""

import builtins
import functools
import json
import os
from pathlib import Path

LISTS = ("PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST", "PT_HPU_AUTOCAST_FP32_OPS_LIST")


def release() -> tuple[int, ...]:
    return tuple(int(part) for part in os.environ.get("GAUDI_STANDIN_RELEASE", "1.23").split("."))


def cards() -> int:
    return int(os.environ.get("GAUDI_STANDIN_CARDS", "1"))


def fail_if_told() -> None:
    """Fail as GAUDI_STANDIN_FAILS says, with the name of an exception and a text."""
    name, _, text = os.environ.get("GAUDI_STANDIN_FAILS", "").partition(": ")
    if name:
        raise getattr(builtins, name)(text)


@functools.cache
def lazy() -> bool:
    """The mode, which is lazy by default up to 1.20, and cannot change once torch was imported."""
    return os.environ.get("PT_HPU_LAZY_MODE", "1" if release() <= (1, 20) else "0") == "1"


def device_type() -> str:
    """What "hpu" is in truth: lazy tensors, and in eager mode those of the CPU."""
    return "lazy" if lazy() else "cpu"


def environment() -> dict:
    """What the software reads from the environment, the lists with the names in them."""
    found = {"PT_HPU_LAZY_MODE": os.environ.get("PT_HPU_LAZY_MODE")}
    return found | {name: Path(os.environ[name]).read_text().split() for name in LISTS if name in os.environ}


def record(call: str, **values) -> None:
    path = os.environ.get("GAUDI_STANDIN_RECORD")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"call": call, **values}) + "\n")
