"""csrc/layers.cpp and csrc/lamb.cpp as functions on tensors: compiled for this machine when first asked for, and kept
for the next run.

    kernels = load()  # KernelsMissing, with the reason, where they cannot be compiled
    kernels.dense_gelu(x, weight, bias, inner, out, *inner.shape, x.shape[1])

Arrays go in as dense CPU tensors of the dtype that the kernel reads; whole numbers and floats go in as they are.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from common.files import cache_folder, replacing

SOURCES = [Path(__file__).with_name("csrc") / name for name in ("layers.cpp", "lamb.cpp")]
HEADERS = [Path(__file__).with_name("csrc") / name for name in ("common.h", "gemm.h")]
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-std=c++17",
         "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 120  # far more than it takes; a compiler that hangs must not hang the run

DTYPES = (torch.float32, torch.float64, torch.int32, torch.int64)
POINTER, WHOLE, SEED, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
SIGNATURES = {
    "product": [POINTER, WHOLE, WHOLE] * 2 + [POINTER] * 2 + [WHOLE] * 4,
    "dense_gelu": [POINTER] * 5 + [WHOLE] * 3,
    "gelu_backward": [POINTER] * 5 + [WHOLE] * 3,
    "dense_residual_norm": [POINTER] * 9 + [WHOLE] * 3 + [REAL, REAL, SEED],
    "residual_norm_backward": [POINTER] * 7 + [WHOLE] * 2 + [REAL, SEED],
    "embed": [POINTER] * 11 + [WHOLE] * 2 + [REAL, REAL, SEED],
    "embed_backward": [POINTER] * 11 + [WHOLE] * 2 + [REAL, SEED],
    "attention": [POINTER] * 4 + [WHOLE] * 4 + [REAL, SEED],
    "attention_backward": [POINTER] * 6 + [WHOLE] * 4 + [REAL, SEED],
    "cross_entropy": [POINTER] * 5 + [WHOLE] * 2 + [REAL],
    "lamb_step": [POINTER] * 5 + [WHOLE] + [REAL] * 8,
    "square_sum": [POINTER] * 2 + [WHOLE, POINTER],
}


class KernelsMissing(RuntimeError):
    """The kernels cannot be compiled or loaded here; the text says why."""


class Kernels:
    """The functions of the compiled library, by the names of SIGNATURES; `lanes`: the numbers in a vector here."""

    def __init__(self, path: Path):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsMissing(f"{path}: {error}") from None
        self.lanes = WHOLE.in_dll(library, "lanes").value
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
            setattr(self, name, functools.partial(call, function))


def call(function, *arguments) -> None:
    """Call a kernel with the addresses of the tensors among its arguments; a profiler sees it by its name."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.device.type == "cpu" and argument.is_contiguous(), f"{function.__name__}: {argument.shape}"
            assert argument.dtype in DTYPES, f"{function.__name__}: {argument.dtype}"
    with torch.profiler.record_function(function.__name__):
        function(*(argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments))


@functools.cache
def load() -> Kernels:
    """The kernels of this machine, compiled now where they are not there yet (about 4 seconds)."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise KernelsMissing(f"no C++ compiler {os.environ.get('CXX', 'g++')} (CXX names another)")
    command = [compiler, *FLAGS, *map(str, SOURCES), *openmp_library()]
    path = cache_folder() / f"cpu_kernels_{fingerprint(command)}.so"
    if not path.exists():
        compile_to(path, command)
    return Kernels(path)


def problem() -> str | None:
    """Why the kernels cannot be had on this machine, or None."""
    try:
        load()
    except KernelsMissing as error:
        return str(error)
    return None


def fingerprint(command: list[str]) -> str:
    """A name for what the compiler would make: it changes with the source, the command and the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    processor = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    texts = [path.read_text(encoding="utf-8") for path in SOURCES + HEADERS]
    parts = [*texts, *command, platform.machine(), *processor]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def compile_to(path: Path, command: list[str]) -> None:
    try:
        with replacing(path) as temporary:
            done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, text=True,
                                  timeout=COMPILE_SECONDS)
            if done.returncode:
                first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
                raise KernelsMissing(f"{command[0]}: {first}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsMissing(f"cannot compile {path}: {error}") from None


def openmp_library() -> list[str]:
    """The OpenMP library that torch has loaded: with one of their own, the kernels' threads would fight torch's."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})  # a path may hold spaces
