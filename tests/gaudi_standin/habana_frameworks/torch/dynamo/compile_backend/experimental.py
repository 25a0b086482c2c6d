import torch

from habana_frameworks import standin

if standin.release() < (1, 20):
    raise ImportError("cannot import name 'enable_compiled_autograd'")


def enable_compiled_autograd() -> None:
    """From here on every backward pass is compiled, in the whole process."""
    standin.record("enable_compiled_autograd")
    torch._dynamo.config.optimize_ddp = "python_reducer"
    torch._dynamo.compiled_autograd._enable(torch.compile(backend="hpu_backend")).__enter__()
