"""Gaudi's software is loaded here, after the environment variables that it reads then are set.  No torch here.

It is loaded by `import torch`, in lazy mode by its own import.  It then chooses the card and reads the mode and the op
lists, once and for all.
"""

import gc
import importlib
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import UserError, first_line
from devices import op_lists
from devices.options import DeviceOptions, PrecisionOptions

LAZY_MODE = "PT_HPU_LAZY_MODE"
BF16_LIST = "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST"
FP32_LIST = "PT_HPU_AUTOCAST_FP32_OPS_LIST"
CARD = "HLS_MODULE_ID"
VISIBLE_CARDS = "HABANA_VISIBLE_MODULES"
HL_SMI_SECONDS = 10


@contextmanager
def prepared(device: DeviceOptions, precision: PrecisionOptions, local_rank: int | None = None):
    """A block in which torch is imported: with --use_habana after Gaudi's variables were set, and with its software.

    `local_rank` chooses the card; None: any that is free.  UserError where the options contradict variables that are
    set already, and where the software cannot be loaded.  The block restores the environment.
    """
    with TemporaryDirectory(prefix="op_lists_") as folder:
        settings = variables(device, precision, local_rank, Path(folder)) if device.use_habana else {}
        before = {name: os.environ[name] for name in settings if name in os.environ}
        os.environ.update(settings)
        try:
            load_software(device.use_habana)
            yield
        finally:
            for name in settings:
                del os.environ[name]
            os.environ.update(before)


def variables(device: DeviceOptions, precision: PrecisionOptions, local_rank: int | None,
              folder: Path) -> dict[str, str]:
    """The variables that the options ask for; files that they name are written to `folder`."""
    return {LAZY_MODE: "1" if lazy_mode(device, os.environ) else "0", **card_variable(local_rank, os.environ),
            **list_variables(precision, os.environ, folder)}


def load_software(use_habana: bool) -> None:
    """Import torch and, with `use_habana`, Gaudi's software.  UserError names the releases where that fails."""
    try:
        with nullcontext() if "torch" in sys.modules else uncollected_imports():
            importlib.import_module("torch")
            if use_habana:
                importlib.import_module("habana_frameworks.torch.core")
    except (AssertionError, AttributeError, ImportError, OSError, RuntimeError) as error:
        what = "--use_habana: no HPU can be used" if use_habana else "PyTorch cannot be imported"
        raise UserError(f"{what}: {first_line(error.__cause__ or error)} ({releases()})") from None


@contextmanager
def uncollected_imports():
    """A block that imports large packages, whose objects live to the end: the garbage collector need not look through
    them, neither now (a tenth of the import of torch) nor when the interpreter ends (0.2 s).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def releases() -> str:
    """The releases of the software that must fit together."""
    found = {"torch": package_release("torch"), "habana-torch-plugin": package_release("habana-torch-plugin"),
             "driver": driver_release()}
    return ", ".join(f"{name} {release or 'not found'}" for name, release in found.items())


def package_release(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def driver_release() -> str | None:
    """The driver's release as hl-smi tells it, or None."""
    try:
        done = subprocess.run(["hl-smi", "-Q", "driver_version", "-f", "csv,noheader"], capture_output=True,
                              encoding="utf-8", errors="replace", timeout=HL_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


def card_variable(local_rank: int | None, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that chooses the card.  UserError where HABANA_VISIBLE_MODULES leaves none for this rank."""
    if local_rank is None or CARD in environ:
        return {}
    cards = environ.get(VISIBLE_CARDS)
    if not cards:
        return {CARD: str(local_rank)}
    if local_rank >= len(cards.split(",")):
        raise UserError(f"local rank {local_rank}, but {VISIBLE_CARDS}={cards} names {len(cards.split(','))} cards")
    return {CARD: cards.split(",")[local_rank]}


def lazy_mode(device: DeviceOptions, environ: Mapping[str, str]) -> bool:
    """Whether the run is in lazy mode: by the flag if it is given, else by the environment, else True."""
    asked = False if device.use_torch_compile else device.use_lazy_mode
    value = environ.get(LAZY_MODE)
    if value is None:
        return asked is not False
    if value not in ("0", "1"):
        raise UserError(f"{LAZY_MODE} is {value!r} in the environment, neither 0 (eager, compiled) nor 1 (lazy)")
    if asked is not None and asked != (value == "1"):
        flag = "--use_torch_compile" if device.use_torch_compile else f"--use_lazy_mode {device.use_lazy_mode}"
        raise UserError(f"{LAZY_MODE}={value} in the environment contradicts {flag}")
    return value == "1"


def list_variables(precision: PrecisionOptions, environ, folder: Path) -> dict[str, str]:
    """Write the given op lists to files in `folder`, in the op names of Gaudi's autocast; {variable: path of a file}.

    A list replaces the whole default list of autocast, so only given lists are set.  UserError where a list that the
    environment names already differs.  (Software with hmp reads the given files itself and ignores these variables.)
    """
    lists = op_lists.read_lists(precision) if precision.bf16 else None
    if lists is None:
        return {}
    found = {}
    for variable, flag, path, ops in ((BF16_LIST, "--hmp_bf16", precision.bf16_list, lists.bf16),
                                      (FP32_LIST, "--hmp_fp32", precision.fp32_list, lists.fp32)):
        if path and variable in environ:
            differing = sorted((op_lists.read_list(environ[variable], variable) ^ ops) - op_lists.IN_PLACE)
            if differing:
                raise UserError(f"{variable}={environ[variable]} in the environment contradicts {flag} {path}: "
                                f"they differ in {', '.join(differing)}")
        elif path:
            file = folder / f"{variable}.txt"
            file.write_text("".join(f"{name}\n" for name in op_lists.aten_names(ops)), encoding="utf-8")
            found[variable] = str(file)
    return found
