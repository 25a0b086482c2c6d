"""What a run says where bf16 is slower than fp32 on its CPU."""

import pytest
import torch

from devices.device import Device
from ops.attention import LayerRequest, choose
from tests.support import samples
from training import bf16_speed

SECONDS = {"kernels": 0.5, "plain": 2.0, "hashed": 1.7}


def request(dtype=torch.bfloat16, **changes) -> LayerRequest:
    return LayerRequest(**{"attention": None, "use_cpu_kernels": True, "compiled": False, "dtype": dtype, "rows": 3,
                           "length": 24, **changes})


def warning(request: LayerRequest) -> str | None:
    device, config = Device(), samples.config()
    name, _ = choose(device, config, request)
    return bf16_speed.bf16_warning(device, config, name, request, lambda: device.autocast(torch.bfloat16))


@pytest.mark.parametrize("changes, times", [({}, "3.4"), ({"op_lists": True}, "4.0"), ({"compiled": True}, None)])
def test_a_run_says_how_much_slower_bf16_is(monkeypatch, changes, times):
    """Against what fp32 would run in: the kernels, or PyTorch's operations."""
    monkeypatch.setattr(bf16_speed, "layer_seconds", lambda config, name, *others: SECONDS[name])
    found = warning(request(**changes))
    assert found is None if times is None else f"{times} times as long in bf16 as in fp32" in found


def test_a_run_in_fp32_and_one_with_fast_bf16_say_nothing(monkeypatch):
    monkeypatch.setattr(bf16_speed, "layer_seconds", lambda config, name, *others: {"kernels": 2.0}.get(name, 1.0))
    assert warning(request()) is warning(request(torch.float32)) is None


def test_the_measurement_changes_no_random_numbers_of_the_run():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    warning(request())
    assert torch.equal(torch.rand(3), expected)
