"""Compiled graphs: torch.compile for a run that asks for it, and a watch on graphs that keep compiling."""

from contextlib import contextmanager

import torch

from common.errors import first_line

WARM_UP_STEPS = 3  # of a run, in which each graph of a step compiles


def compile_training(device, model: torch.nn.Module, cuda_graphs=False) -> tuple[bool, str]:
    """Compile the model for the device: whether the compiler works, so that the optimizer may be compiled too, and a
    description.  Where it does not work, the model stays as it is, and the description says why.

    With `cuda_graphs`, the compiled parts of the model are recorded and replayed without the host (CUDA).
    """
    problem = compiler_problem(device)
    if problem:
        return False, f"--use_torch_compile: not compiled: {problem}"
    compile_model(device, model, cuda_graphs)
    return True, f"--use_torch_compile: the model is compiled by {device.compiler}"


def compile_model(device, model: torch.nn.Module, cuda_graphs=False) -> None:
    """In place, so that the names in its state dict stay the same.

    inductor gets a layer at a time: all layers share one graph, compiled once, whatever the depth.  So BERT-base is
    ready in a minute, and shapes that vary would show as graphs that are compiled again.
    """
    parts = [model]
    if device.compiles_in_parts:
        parts = [*model.bert.encoder.layer, model.bert.embeddings, model.bert.pooler, model.cls.predictions]
    for part in parts:
        part.compile(backend=device.compiler, **({"mode": "reduce-overhead"} if cuda_graphs else {}))
    if cuda_graphs:
        prepare_replay(model)


def prepare_replay(model: torch.nn.Module) -> None:
    """Make what recorded graphs compute outlast them: the next pass writes its results to the same memory.

    Where a pass begins, it says so, since the graphs cannot tell it from the many parts that it is compiled in.
    Gradients lie in memory of their own, to which a backward pass adds: zero_grad has to leave them there.
    """
    model.bert.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def compiler_problem(device) -> str | None:
    """Why the device's compiler does not work, found out by compiling next to nothing, or None."""
    try:
        twice = torch.compile(lambda value: value * 2.0, backend=device.compiler)
        twice(torch.ones(2).to(device.torch_device))
    except Exception as error:  # whatever a compiler that is not there, or half there, happens to raise
        return f"{device.compiler} on {device.torch_device.type}: {type(error).__name__}: {first_line(error)}"
    return None


class GraphWatch:
    """Notices graphs that training steps still compile after the warm-up: a step should meet only shapes it has met.

    Graphs compiled while `paused` (to evaluate, to save) do not count.
    """

    def __init__(self, device):
        self.device = device
        self.elsewhere = 0
        self.compiled_before: int | None = None

    def compiled(self) -> int:
        return self.device.graphs().get("graph_compilation", 0)

    @contextmanager
    def paused(self):
        before = self.compiled()
        yield
        self.elsewhere += self.compiled() - before

    def new_graphs(self, steps: int) -> int:
        """How many graphs compiled since this was last asked; 0 within the warm-up.  `steps` are those of the run."""
        compiled = self.compiled() - self.elsewhere
        before = compiled if self.compiled_before is None else self.compiled_before
        if steps >= WARM_UP_STEPS:
            self.compiled_before = compiled
        return compiled - before
