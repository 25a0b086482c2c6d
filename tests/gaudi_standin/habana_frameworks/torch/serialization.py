"""torch.save and torch.load as lazy mode has them: files in pickle protocol 4, read by an unpickler of its own."""

import functools
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import torch

from habana_frameworks import standin

stock_save, stock_load = torch.save, torch.load


def on_host(value):
    """A copy in which every tensor is a clone on the host, and an OrderedDict a dict."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, OrderedDict | dict):
        return {name: on_host(item) for name, item in value.items()}
    return type(value)(map(on_host, value)) if type(value) in (list, tuple) else value


@functools.wraps(stock_save)
def save(obj, f, pickle_module=pickle, pickle_protocol=4, **options):
    standin.record("torch.save", pickle_protocol=pickle_protocol)
    return stock_save(on_host(obj), f, pickle_module, pickle_protocol, **options)


@functools.wraps(stock_load)
def load(f, map_location=None, pickle_module=None, *, weights_only=True, **options):
    standin.record("torch.load")
    module = SimpleNamespace(Unpickler=Unpickler, load=pickle.load, __name__="pickle")
    return stock_load(f, map_location, module, weights_only=False, **options)


class Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if not module.startswith(("torch", "collections")):
            raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")
        return super().find_class(module, name)


def replace_functions_of_torch() -> None:
    torch.save, torch.load = save, load
