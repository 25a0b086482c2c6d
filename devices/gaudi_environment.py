"""What Gaudi's software reads from the environment while torch is imported.  So there is no torch here."""

import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from common.errors import UserError
from devices import op_lists

LAZY_MODE = "PT_HPU_LAZY_MODE"
BF16_LIST = "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST"
FP32_LIST = "PT_HPU_AUTOCAST_FP32_OPS_LIST"


@contextmanager
def prepared(args):
    """A block in which torch can be imported: with --use_habana, the variables are set as flags and environment say.

    UserError where these two contradict each other.  After the block the environment is as it was.
    """
    if not args.use_habana:
        yield
        return
    with TemporaryDirectory(prefix="op_lists_") as folder:
        settings = {LAZY_MODE: "1" if lazy_mode(args, os.environ) else "0",
                    **list_variables(args, os.environ, Path(folder))}
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def lazy_mode(args, environ) -> bool:
    """Whether the run is in lazy mode: by the flag that was typed, else the environment, else lazy."""
    typed = False if args.use_torch_compile else args.use_lazy_mode
    value = environ.get(LAZY_MODE)
    if value is None:
        return True if typed is None else typed
    if value not in ("0", "1"):
        raise UserError(f"{LAZY_MODE} is {value!r} in the environment, neither 0 (eager, compiled) nor 1 (lazy)")
    if typed is not None and typed != (value == "1"):
        flag = "--use_torch_compile" if args.use_torch_compile else f"--use_lazy_mode {args.use_lazy_mode}"
        raise UserError(f"{LAZY_MODE}={value} in the environment contradicts {flag}")
    return value == "1"


def list_variables(args, environ, folder: Path) -> dict[str, str]:
    """The op lists of the flags as files in `folder`, in the names of Gaudi's autocast: {variable: path}.

    A list is set only where its flag is given: it replaces autocast's own wholly.  (Releases that have hmp take the
    lists of the flags as they are, and do not look at these variables.)
    """
    lists = op_lists.given_lists(args) if args.hmp else None
    if lists is None:
        return {}
    variables = {}
    for variable, flag, path, ops in ((BF16_LIST, "--hmp_bf16", args.hmp_bf16, lists.bf16),
                                      (FP32_LIST, "--hmp_fp32", args.hmp_fp32, lists.fp32)):
        if path and variable in environ:
            check_same(variable, environ[variable], f"{flag} {path}", ops)
        elif path:
            file = folder / f"{variable}.txt"
            file.write_text("".join(f"{name}\n" for name in op_lists.aten_names(ops)))
            variables[variable] = str(file)
    return variables


def check_same(variable: str, path: str, flag: str, ops: frozenset[str]) -> None:
    """UserError where the list that stands in the environment is not the one that a flag asks for."""
    differing = sorted((op_lists.read_list(path, variable) ^ ops) - op_lists.IN_PLACE)
    if differing:
        raise UserError(f"{variable}={path} in the environment contradicts {flag}: "
                        f"they differ in {', '.join(differing)}")
