"""AdamW in all its ways of computing against torch.optim.AdamW; a step that is not finite changes nothing."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from optim.adamw import AdamW, CompiledAdamW, FusedAdamW

CLASSES = [FusedAdamW, AdamW, partial(AdamW, foreach=False),
           partial(CompiledAdamW, backend="eager", in_parts=False)]
SHAPES = [(5, 3), (7,), (1,)]
RATES = (0.1, 0.05, 0.02)


def steps_of(make, clip: bool, gradients) -> list[torch.Tensor]:
    """The weights after a step with each of `gradients`; the last weight does not decay."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make([{"params": weights[:2], "weight_decay": 0.3}, {"params": weights[2:], "weight_decay": 0.0}])
    for rate, of_step in zip(RATES, gradients, strict=False):
        for weight, gradient in zip(weights, of_step, strict=True):
            weight.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = rate
        if clip:
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    return [weight.detach() for weight in weights]


def random_gradients() -> list[list[torch.Tensor]]:
    """Of three steps: the first is clipped, the others are not."""
    torch.manual_seed(1)
    return [[factor * torch.randn(shape) for shape in SHAPES] for factor in (3.0, 0.05, 0.1)]


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_steps_are_those_of_torchs_adamw_after_its_clipping(optimizer_class):
    expected = steps_of(partial(torch.optim.AdamW, betas=(0.9, 0.999), eps=1e-6), True, random_gradients())
    found = steps_of(optimizer_class, False, random_gradients())
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, atol=2e-6, rtol=2e-5)  # torch adds 1e-6 to the norm that it clips by


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_step_that_is_not_finite_leaves_the_weights_as_they_are(optimizer_class):
    gradients = random_gradients()
    gradients[1][0][0, 0] = float("inf")
    for one, other in zip(steps_of(optimizer_class, False, gradients[:2]),
                          steps_of(optimizer_class, False, gradients[:1]), strict=True):
        assert torch.equal(one, other)
