"""The environment variables that Gaudi's software reads while torch is imported.  No torch here."""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import UserError
from devices import op_lists
from devices.options import DeviceOptions, PrecisionOptions

LAZY_MODE = "PT_HPU_LAZY_MODE"
BF16_LIST = "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST"
FP32_LIST = "PT_HPU_AUTOCAST_FP32_OPS_LIST"


@contextmanager
def prepared(device: DeviceOptions, precision: PrecisionOptions):
    """A block in which to import torch: with --use_habana, Gaudi's variables are set from the options.

    UserError where the options contradict variables that are already set.  The block restores the environment.
    """
    if not device.use_habana:
        yield
        return
    with TemporaryDirectory(prefix="op_lists_") as folder:
        settings = {LAZY_MODE: "1" if lazy_mode(device, os.environ) else "0",
                    **list_variables(precision, os.environ, Path(folder))}
        before = {name: os.environ[name] for name in settings if name in os.environ}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name in settings:
                del os.environ[name]
            os.environ.update(before)


def lazy_mode(device: DeviceOptions, environ) -> bool:
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
    variables = {}
    for variable, flag, path, ops in ((BF16_LIST, "--hmp_bf16", precision.bf16_list, lists.bf16),
                                      (FP32_LIST, "--hmp_fp32", precision.fp32_list, lists.fp32)):
        if path and variable in environ:
            differing = sorted((op_lists.read_list(environ[variable], variable) ^ ops) - op_lists.IN_PLACE)
            if differing:
                raise UserError(f"{variable}={environ[variable]} in the environment contradicts {flag} {path}: "
                                f"they differ in {', '.join(differing)}")
        elif path:
            file = folder / f"{variable}.txt"
            file.write_text("".join(f"{name}\n" for name in op_lists.aten_names(ops)))
            variables[variable] = str(file)
    return variables
