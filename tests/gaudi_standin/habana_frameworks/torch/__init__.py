"""The plugin: from its import on, "hpu" is a device, and the environment holds what HCCL needs."""

import torch
import torch._lazy
import torch._lazy.metrics
import torch._lazy.ts_backend
from torch.overrides import TorchFunctionMode

from habana_frameworks import standin
from habana_frameworks.casts import DEFAULT_BF16, DEFAULT_FP32, casts

standin.fail_if_told()


class HpuDevice(TorchFunctionMode):
    """Hands every "hpu" among an op's arguments on as the device that stands in for it, and casts the others.

    The name itself stays.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = casts.of(func, args, kwargs or {})
        return func(*map(translated, args), **{name: translated(value) for name, value in kwargs.items()})


def translated(value):
    if (isinstance(value, torch.device) and value.type == "hpu") or (isinstance(value, str) and value == "hpu"):
        return torch.device(standin.device_type())
    return value


class RecordedAutocast(torch.autocast):
    def __enter__(self):
        standin.record("torch.autocast", device=self.device, enabled=self._enabled, dtype=str(self.fast_dtype))
        self.casting = casts.switched(self._enabled)
        self.casting.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        self.casting.__exit__(*error)
        return super().__exit__(*error)


told = standin.environment()
standin.record("import habana_frameworks.torch", **told)
casts.use(told.get(standin.LISTS[0], DEFAULT_BF16), told.get(standin.LISTS[1], DEFAULT_FP32))
if standin.lazy():
    torch._lazy.ts_backend.init()
    from habana_frameworks.torch import serialization

    serialization.replace_functions_of_torch()
from habana_frameworks.torch import hpu  # noqa: E402

torch.hpu = torch.lazy = hpu  # the latter for torch.utils.checkpoint, which sees the device that stands in
torch.autocast = RecordedAutocast
torch._dynamo.register_backend(lambda graph, inputs: graph.forward, name="hpu_backend")
HpuDevice().__enter__()
from habana_frameworks.torch.distributed import hccl  # noqa: E402, F401
