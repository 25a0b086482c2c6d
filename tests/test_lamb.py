"""NVLAMB against numbers worked out by hand, and its ways of computing against each other."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from lamb import NVLAMB
from modeling import BertForPreTraining
from optim import fused_lamb
from optim.build import parameter_groups
from optim.fused_lamb import CpuFusedNVLAMB, MultiTensorNVLAMB, SlicedNVLAMB
from tests.support import samples


def by_hand(weights, gradients_of_steps, rate, decays):
    """LAMB's formulas on plain lists of floats."""
    moments = [([0.0] * len(weight), [0.0] * len(weight)) for weight in weights]
    for step, gradients in enumerate(gradients_of_steps, start=1):
        norm = math.sqrt(sum(value**2 for gradient in gradients for value in gradient))
        for weight, gradient, (m, v), decay in zip(weights, gradients, moments, decays, strict=True):
            update = []
            for i, value in enumerate(gradient):
                clipped = value / max(1.0, norm)
                m[i] = 0.9 * m[i] + 0.1 * clipped
                v[i] = 0.999 * v[i] + 0.001 * clipped**2
                corrected = (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.999**step)) + 1e-6)
                update.append(corrected + decay * weight[i])
            weight_norm, update_norm = math.hypot(*weight), math.hypot(*update)
            ratio = weight_norm / update_norm if decay and weight_norm and update_norm else 1.0
            for i in range(len(weight)):
                weight[i] -= rate * ratio * update[i]
    return weights


def lamb_steps(weights, gradients_of_steps, rate, decays, optimizer_class):
    parameters = [torch.nn.Parameter(torch.tensor(weight)) for weight in weights]
    optimizer = optimizer_class([{"params": [parameter], "weight_decay": decay}
                                 for parameter, decay in zip(parameters, decays, strict=True)], lr=rate)
    for gradients in gradients_of_steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
        optimizer.step()
    return parameters, optimizer


CLASSES = [NVLAMB, partial(NVLAMB, foreach=False), SlicedNVLAMB, CpuFusedNVLAMB, MultiTensorNVLAMB]
WEIGHTS = [[0.5, -1.0, 2.0], [0.3, 0.0], [0.0, 0.0]]
DECAYS = [0.01, 0.0, 0.01]
GRADIENTS = [[[3.0, 0.1, -2.0], [0.7, 1.0], [0.2, 0.1]],  # norm 3.8: clipped
             [[0.1, 0.2, 0.3], [-0.4, 0.0], [0.1, 0.3]]]  # norm 0.6: not clipped


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_lamb_first_two_steps_by_hand(optimizer_class):
    for steps in (1, 2):
        expected = by_hand([list(weight) for weight in WEIGHTS], GRADIENTS[:steps], 0.1, DECAYS)
        parameters, _ = lamb_steps(WEIGHTS, GRADIENTS[:steps], 0.1, DECAYS, optimizer_class)
        for parameter, weight in zip(parameters, expected, strict=True):
            assert_close(parameter.detach(), torch.tensor(weight), atol=1e-6, rtol=1e-5)


def test_lamb_first_step_by_hand_in_one_line():
    """One weight 2, gradient 0.5: u = 0.5/(0.5 + 1e-6) + 0.01·2 = 1.02, trust 2/1.02, w = 2 − 0.1·2 = 1.8."""
    (parameter,), _ = lamb_steps([[2.0]], [[[0.5]]], 0.1, [0.01], SlicedNVLAMB)
    assert parameter.item() == pytest.approx(1.8, abs=1e-6)


def test_the_kernel_gives_the_same_steps_at_any_length():
    """Lengths around the block of the kernel, one parameter beside another, in one group."""
    lengths, results = (1, 4095, 4096, 4097, 20_001, 3), []
    for optimizer_class in (NVLAMB, CpuFusedNVLAMB):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(length)) for length in lengths]
        optimizer = optimizer_class([{"params": parameters[:5], "weight_decay": 0.01},
                                     {"params": parameters[5:], "weight_decay": 0.0}], lr=0.1)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
        results.append(parameters)
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, atol=5e-6, rtol=1e-5)


def test_states_of_the_kernel_and_of_the_slices_are_exchanged():
    parameters, optimizer = lamb_steps(WEIGHTS, GRADIENTS[:1], 0.1, DECAYS, CpuFusedNVLAMB)
    others, other = lamb_steps([parameter.tolist() for parameter in parameters], [], 0.1, DECAYS, SlicedNVLAMB)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, own in ((parameters, optimizer), (others, other)):
        for parameter, gradient in zip(group, GRADIENTS[1], strict=True):
            parameter.grad = torch.tensor(gradient)
        own.step()
    for one, two in zip(parameters, others, strict=True):
        assert_close(one, two, atol=1e-6, rtol=1e-5)


def test_slices_of_any_length_give_the_same_step(monkeypatch):
    torch.manual_seed(0)
    weights = [torch.randn(101).tolist(), torch.randn(7).tolist()]
    gradients = [[torch.randn(101).tolist(), torch.randn(7).tolist()] for _ in range(3)]
    expected, _ = lamb_steps(weights, gradients, 0.1, [0.01, 0.0], NVLAMB)
    for length in (1, 10, 101, 1000):
        monkeypatch.setattr(fused_lamb, "SLICE", length)
        found, _ = lamb_steps(weights, gradients, 0.1, [0.01, 0.0], SlicedNVLAMB)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("optimizer_class", CLASSES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing_but_the_count(optimizer_class, bad):
    broken = [[bad, 0.1, 0.2], [0.1, 0.1], [0.0, 0.1]]
    before, _ = lamb_steps(WEIGHTS, GRADIENTS[:1], 0.1, DECAYS, optimizer_class)
    after, optimizer = lamb_steps(WEIGHTS, [GRADIENTS[0], broken], 0.1, DECAYS, optimizer_class)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
    assert optimizer.skipped_steps.item() == 1
    assert optimizer.param_groups[0]["step"] == 2
    assert all(torch.isfinite(state["exp_avg"]).all() for state in optimizer.state.values())


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_loss_scale_changes_no_step_and_an_overflow_skips_it(optimizer_class):
    """As under --fp16: gradients come multiplied by a scale that the GradScaler knows."""
    expected, _ = lamb_steps(WEIGHTS, GRADIENTS, 0.1, DECAYS, optimizer_class)
    parameters, optimizer = lamb_steps(WEIGHTS, [], 0.1, DECAYS, optimizer_class)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for factor, gradients in ((1.0, GRADIENTS[0]), (1.0, GRADIENTS[1]), (float("inf"), GRADIENTS[1])):
        loss = sum((parameter * torch.tensor(gradient)).sum()
                   for parameter, gradient in zip(parameters, gradients, strict=True))
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for parameter, weight in zip(parameters, expected, strict=True):
        assert_close(parameter, weight, atol=1e-6, rtol=1e-5)
    assert (scaler.get_scale(), optimizer.skipped_steps.item()) == (2.0**19, 1)


def test_gradient_norm_is_that_of_the_whole_model():
    _, optimizer = lamb_steps(WEIGHTS, GRADIENTS[:1], 0.1, DECAYS, SlicedNVLAMB)
    assert optimizer.gradient_norm.item() == pytest.approx(math.sqrt(9 + 0.01 + 4 + 0.49 + 1 + 0.04 + 0.01))


def test_a_restored_optimizer_goes_on_alike():
    parameters, optimizer = lamb_steps(WEIGHTS, GRADIENTS[:1], 0.1, DECAYS, SlicedNVLAMB)
    others, other = lamb_steps([parameter.tolist() for parameter in parameters], [], 0.1, DECAYS, SlicedNVLAMB)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group, gradients in ((parameters, GRADIENTS[1]), (others, GRADIENTS[1])):
        for parameter, gradient in zip(group, gradients, strict=True):
            parameter.grad = torch.tensor(gradient)
    optimizer.step()
    other.step()
    for one, two in zip(parameters, others, strict=True):
        assert torch.equal(one, two)


def test_groups_hold_each_parameter_once_and_spare_biases_and_layer_norms():
    model = BertForPreTraining(samples.config())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decaying, spared = parameter_groups(model)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    found = [names[id(parameter)] for group in (decaying, spared) for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    assert {names[id(parameter)] for parameter in spared["params"]} == {
        name for name in names.values() if name.endswith(".bias") or ".LayerNorm." in name}
