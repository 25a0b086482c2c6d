"""HPU graphs: here forward passes are checked as the real ones are recorded, and run as they are."""

import functools

from habana_frameworks import standin

if standin.release() < (1, 8):
    raise ImportError("no HPU graphs for training")


class ModuleCacher:
    """Caches the graphs of a module by the form of its inputs."""

    def __init__(self, max_graphs: int = 10):
        self.max_graphs = max_graphs

    def __call__(self, model, inplace: bool = True, allow_unused_input: bool = False,
                 have_grad_accumulation: bool = False):
        if not standin.lazy():
            raise RuntimeError("HPU graphs are supported in lazy mode only")
        standin.record("ModuleCacher", have_grad_accumulation=have_grad_accumulation)
        forward, forms = model.forward, set()
        model.iteration_count = None

        @functools.wraps(forward)
        def cached(inputs):
            if not model.training:
                raise RuntimeError("the stand-in caches graphs of training only")
            forms.add(tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items()))
            if len(forms) > self.max_graphs:
                raise RuntimeError(f"more than {self.max_graphs} forms of inputs")
            if have_grad_accumulation and model.iteration_count is None:
                raise RuntimeError("set_iteration_count was not called")
            standin.record("HPU graph", iteration=model.iteration_count)
            model.iteration_count = None
            return forward(inputs)

        def set_iteration_count(count: int) -> None:
            model.iteration_count = count

        model.forward, model.set_iteration_count = cached, set_iteration_count
        return model
