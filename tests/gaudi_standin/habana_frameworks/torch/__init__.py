"""The plugin: from its import on, "hpu" is a device."""

import torch
import torch._lazy
import torch._lazy.metrics
import torch._lazy.ts_backend
from torch.overrides import TorchFunctionMode

from habana_frameworks import standin


class HpuDevice(TorchFunctionMode):
    """Hands every "hpu" among an op's arguments on as the device that stands in for it; the name itself stays."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        kwargs = {name: translated(value) for name, value in (kwargs or {}).items()}
        return func(*map(translated, args), **kwargs)


def translated(value):
    if (isinstance(value, torch.device) and value.type == "hpu") or (isinstance(value, str) and value == "hpu"):
        return torch.device(standin.device_type())
    return value


class RecordedAutocast(torch.autocast):
    def __enter__(self):
        standin.record("torch.autocast", device=self.device, enabled=self._enabled, dtype=str(self.fast_dtype))
        return super().__enter__()


standin.record("import habana_frameworks.torch", **standin.environment())
if standin.lazy():
    torch._lazy.ts_backend.init()
from habana_frameworks.torch import hpu  # noqa: E402

torch.hpu = hpu
torch.autocast = RecordedAutocast
torch._dynamo.register_backend(lambda graph, inputs: graph.forward, name="hpu_backend")
HpuDevice().__enter__()
