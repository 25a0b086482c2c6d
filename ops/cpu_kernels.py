"""csrc/layers.cpp and csrc/lamb.cpp as functions on tensors: compiled for this machine at first use, and cached.

    kernels = load()  # KernelsMissing, with the reason, where they cannot be compiled
    kernels.dense_gelu(x, weight, bias, inner, out, *inner.shape, x.shape[1])

Array arguments are dense CPU tensors of the dtype that the kernel reads; the others are Python numbers.
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
HEADERS = [Path(__file__).with_name("csrc") / name for name in ("common.h", "parts.h", "gemm.h", "shared_gemm.h")]
FLAGS = ("-O3", "-march=native", "-mprefer-vector-width=512", "-fno-math-errno", "-fno-trapping-math", "-std=c++17",
         "-fopenmp", "-shared", "-fPIC")
COMPILE_TIMEOUT = 120  # seconds, far more than it takes: a compiler that hangs must not hang the run

DTYPES = (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64)
POINTER, INT, SEED, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_float
SIGNATURES = {
    "gemms": [POINTER, INT],
    "dense_gelu": [POINTER] * 5 + [INT] * 3,
    "gelu_backward": [POINTER] * 5 + [INT] * 3,
    "dense_residual_norm": [POINTER] * 9 + [INT] * 3 + [FLOAT, FLOAT, SEED],
    "residual_norm_backward": [POINTER] * 7 + [INT] * 2 + [FLOAT, SEED],
    "embed": [POINTER] * 11 + [INT] * 2 + [FLOAT, FLOAT, SEED],
    "embed_backward": [POINTER] * 11 + [INT] * 2 + [FLOAT, SEED],
    "attention": [POINTER] * 4 + [INT] * 4 + [FLOAT, SEED],
    "attention_backward": [POINTER] * 6 + [INT] * 4 + [FLOAT, SEED],
    "dropout_fp32": [POINTER] * 2 + [INT, FLOAT, SEED],
    "dropout_bf16": [POINTER] * 2 + [INT, FLOAT, SEED],
    "cross_entropy": [POINTER] * 5 + [INT] * 2 + [FLOAT],
    "lamb_step": [POINTER] * 5 + [INT] + [FLOAT] * 8,
    "square_sum": [POINTER] * 2 + [INT, POINTER],
}


class KernelsMissing(RuntimeError):
    """The kernels cannot be compiled or loaded here; the text says why."""


class Kernels:
    """The functions of the compiled library, by the names of SIGNATURES; `lanes`: fp32 numbers in a vector."""

    def __init__(self, path: Path):
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelsMissing(f"{path}: {error}") from None
        self.lanes = INT.in_dll(library, "lanes").value
        for name, types in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None
            setattr(self, name, functools.partial(call, function))


def call(function, *arguments) -> None:
    """Call a kernel with the addresses of the tensors among its arguments, under its name in the profiler."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.device.type == "cpu" and argument.is_contiguous(), f"{function.__name__}: {argument.shape}"
            assert argument.dtype in DTYPES, f"{function.__name__}: {argument.dtype}"
    values = [argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
    if not torch.autograd._profiler_enabled():  # where nothing is recorded, record_function takes 17 us
        function(*values)
        return
    with torch.profiler.record_function(function.__name__):
        function(*values)


@functools.cache
def load() -> Kernels:
    """The kernels of this machine, compiled now where they are not in the cache (about 4 seconds)."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise KernelsMissing(f"no C++ compiler {os.environ.get('CXX', 'g++')} (CXX names another)")
    command = [compiler, *FLAGS, *map(str, SOURCES), *openmp_library()]
    path = cache_folder() / f"cpu_kernels_{fingerprint(command)}.so"
    if not path.exists():
        compile_to(path, command)
    return Kernels(path)


def unavailable_reason() -> str | None:
    """Why the kernels cannot be compiled or loaded on this machine, or None."""
    try:
        load()
    except KernelsMissing as error:
        return str(error)
    return None


def fingerprint(command: list[str]) -> str:
    """A hash of all that the compiled library depends on: the sources, the command and the processor."""
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
            done = subprocess.run([*command, "-o", str(temporary)], capture_output=True, encoding="utf-8",
                                  errors="replace", timeout=COMPILE_TIMEOUT)
            if done.returncode:
                first = next(iter(done.stderr.splitlines()), f"exit code {done.returncode}")
                raise KernelsMissing(f"{command[0]}: {first}")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsMissing(f"cannot compile {path}: {error}") from None


def openmp_library() -> list[str]:
    """The OpenMP library that torch has loaded: another one's threads would compete with torch's for the cores."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})  # a path may contain spaces
