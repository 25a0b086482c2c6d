"""torch.compile for a run, and the detection of graphs that keep compiling."""

from contextlib import contextmanager

import torch

from common.errors import first_line

WARM_UP_STEPS = 3  # of a run, in which its graphs compile


def compile_training(device, model: torch.nn.Module, *, cuda_graphs=False, compiled_autograd=True) -> tuple[bool, str]:
    """Compile the model; returns whether the device's compiler works, and a description with the reason if not.

    With `cuda_graphs`, the compiled parts of the model are recorded and replayed without the host (CUDA).  With
    `compiled_autograd`, the backward pass is compiled as a whole where the device does that (Gaudi).
    """
    problem = compiler_problem(device)
    if problem:
        return False, f"--use_torch_compile: not compiled: {problem}"
    backward = device.compile_backward() if compiled_autograd else "its backward pass too, without compiled autograd"
    compile_model(device, model, cuda_graphs)
    return True, f"--use_torch_compile: the model is compiled by {device.compiler}, {backward}"


def compile_model(device, model: torch.nn.Module, cuda_graphs=False) -> None:
    """Compile in place, so that the names in the state dict stay the same.

    inductor gets a layer at a time: all layers share one graph, so that BERT-base compiles in a minute.
    """
    parts = [model]
    if device.compiles_in_parts:
        parts = [*model.bert.encoder.layer, model.bert.embeddings, model.cls.predictions]
        parts += [model.bert.pooler] if model.has_nsp else []
    for part in parts:
        part.compile(backend=device.compiler, **({"mode": "reduce-overhead"} if cuda_graphs else {}))
    if cuda_graphs:
        prepare_replay(model)


def prepare_replay(model: torch.nn.Module) -> None:
    """Prepare the model for replayed graphs, which overwrite the results of the pass before.

    A hook marks the start of each pass, because a pass consists of many compiled parts.  Gradients get memory outside
    the graphs, to which the backward pass adds; zero_grad must keep it (set_to_none=False).
    """
    model.bert.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def compiler_problem(device) -> str | None:
    """Why the device's compiler fails on a trivial function, or None."""
    try:
        twice = torch.compile(lambda value: value * 2.0, backend=device.compiler)
        twice(torch.ones(2).to(device.torch_device))
    except Exception as error:  # a missing or half-installed compiler raises anything
        return f"{device.compiler} on {device.torch_device.type}: {type(error).__name__}: {first_line(error)}"
    return None


class GraphWatch:
    """Counts the graphs that training steps still compile after the warm-up, when they should need no new ones."""

    def __init__(self, device):
        self.device = device
        self.compiled_while_paused = 0
        self.compiled_before: int | None = None

    def compiled(self) -> int:
        return self.device.graphs().get("graph_compilation", 0)

    @contextmanager
    def paused(self):
        """A block whose graphs do not count."""
        before = self.compiled()
        yield
        self.compiled_while_paused += self.compiled() - before

    def new_graphs(self, steps: int) -> int:
        """Graphs compiled since the last call after the warm-up; `steps` counts the steps of this run."""
        compiled = self.compiled() - self.compiled_while_paused
        before = compiled if self.compiled_before is None else self.compiled_before
        if steps >= WARM_UP_STEPS:
            self.compiled_before = compiled
        return compiled - before
