"""bf16: which op runs in which type, what stays in fp32, and what is refused."""


import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from devices.device import Device
from devices.lazy import LazyDevice
from devices.op_list_mode import DtypeReport, OpListMode, op_name
from devices.op_lists import OpLists
from devices.options import PrecisionOptions
from devices.precision import Precision
from lamb import NVLAMB
from modeling import BertForPreTraining
from optim.build import OptimizerOptions, build_optimizer
from tests.support import samples

BF16, FP32 = torch.bfloat16, torch.float32


def options(**changes) -> PrecisionOptions:
    values = {"bf16": True, "bf16_list": "ops_bf16_bert_pt.txt", "fp32_list": "ops_fp32_bert_pt.txt"}
    return PrecisionOptions(**{**values, **changes})


class Recorder(TorchFunctionMode):
    """The types that ops really get, of floating point: entered before the casts, it is asked after them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        tensors = [value for value in [*args, *(kwargs or {}).values()] if isinstance(value, torch.Tensor)]
        floating = tuple(tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point)
        if floating and func.__name__ not in ("__get__", "to"):
            self.calls.append((op_name(func.__name__), floating))
        return func(*args, **(kwargs or {}))


def small_model(precision, **changes) -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(samples.config(vocab_size=99, **changes), "plain", autocast=precision.autocast,
                              casts_off=precision.casts_off)


def small_batch() -> dict:
    batch = samples.unpacked_batch([9, 24, 13])
    return {**batch, "input_ids": batch["input_ids"] % 99, "masked_lm_ids": batch["masked_lm_ids"] % 99}


def test_every_op_of_a_training_step_runs_in_the_type_that_the_lists_give():
    precision = Precision(options(), Device())
    model, recorder = small_model(precision), Recorder()
    with recorder, precision.autocast():
        loss = model(small_batch())["loss"]
    seen = {}
    for op, types in recorder.calls:
        seen.setdefault(op, set()).add(types)
    assert seen == {  # by the rules and the shipped lists, from the embeddings to the loss
        "embedding": {(FP32,)},
        "add": {(BF16, BF16), (FP32, FP32)},  # fp32: the sum of the losses alone
        "layer_norm": {(BF16, FP32, FP32)},  # the first argument alone is cast
        "linear": {(BF16, BF16, BF16)},
        "matmul": {(BF16, BF16)},
        "dropout": {(BF16,)}, "softmax": {(BF16,)}, "gelu": {(BF16,)},
        "rsub": {(BF16,)},  # the mask
        "mul": {(BF16,)}, "tanh": {(BF16,)}, "gather": {(BF16,)},  # in neither list: as their input
        "view": {(BF16,)}, "transpose": {(BF16,)}, "reshape": {(BF16,)}, "getitem": {(BF16,)}, "flatten": {(BF16,)},
        "float": {(BF16,)}, "cross_entropy": {(FP32,)}, "div": {(FP32, FP32)},
    }
    assert recorder.calls.count(("add", (FP32, FP32))) == 1
    counts = {op: sum(1 for name, _ in recorder.calls if name == op) for op in ("linear", "matmul", "softmax", "gelu")}
    assert counts == {"linear": 2 * 6 + 4, "matmul": 2 * 2, "softmax": 2, "gelu": 2 + 1}
    assert loss.dtype == FP32


def test_weights_gradients_and_optimizer_state_stay_fp32_and_so_does_the_optimizer_step():
    class Dispatched(TorchDispatchMode):
        types = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.types |= {value.dtype for value in [*args, result] if isinstance(value, torch.Tensor)}
            return result

    precision = Precision(options(), Device())
    model = small_model(precision)
    optimizer, _ = build_optimizer(model, Device(), OptimizerOptions(learning_rate=0.1))
    with precision.autocast():
        loss = model(small_batch())["loss"]
    precision.backward(loss)
    with precision.autocast(), Dispatched() as dispatched:  # even inside: the step turns casts off
        precision.step(optimizer)
    assert dispatched.types == {FP32, torch.bool} or dispatched.types == {FP32}
    for param in model.parameters():
        assert param.dtype == param.grad.dtype == FP32
        assert optimizer.state[param]["exp_avg"].dtype == optimizer.state[param]["exp_avg_sq"].dtype == FP32


@pytest.mark.parametrize("func, given, run_in", [
    (torch.matmul, (FP32, FP32), (BF16, BF16)),  # bf16 list
    (torch.matmul, (torch.float64, torch.float64), (torch.float64, torch.float64)),  # only float32 is cast
    (torch.true_divide, (BF16, BF16), (FP32, FP32)),  # fp32 list, as truediv and div
    (torch.mul, (BF16, FP32), (FP32, FP32)),  # in neither list: the widest
    (torch.mul, (BF16, BF16), (BF16, BF16)),
    (torch.sub, (FP32, BF16), (FP32, FP32)),
    (torch.pow, (BF16, BF16), (BF16, BF16)),
    (torch.maximum, (BF16, FP32), (BF16, FP32)),  # every other op follows its input
    (torch.Tensor.add_, (FP32, BF16), (FP32, FP32)),  # in place: follows what it changes, list or not
    (torch.Tensor.add_, (BF16, FP32), (BF16, BF16)),
    (torch.Tensor.mul_, (BF16, FP32), (BF16, BF16)),
])
def test_rules_for_two_options(func, given, run_in):
    lists = OpLists(frozenset({"matmul", "add", "iadd"}), frozenset({"div"}))
    recorder = Recorder()
    left, right = (torch.ones(3, 3, dtype=dtype) for dtype in given)
    with recorder, OpListMode(lists):
        func(left, right)
    assert [types for _, types in recorder.calls] == [run_in]


def test_tensors_in_lists_and_keywords_are_cast_too():
    with OpListMode(OpLists(frozenset({"linear"}), frozenset())):
        joined = torch.cat([torch.ones(2, dtype=BF16), torch.ones(2)])
        product = torch.nn.functional.linear(torch.ones(2, 3), weight=torch.ones(4, 3), bias=torch.ones(4))
    assert (joined.dtype, product.dtype) == (FP32, BF16)


def test_layer_norm_casts_all_arguments_where_the_device_wants_one_type():
    recorder = Recorder()
    with recorder, OpListMode(OpLists(frozenset({"layer_norm"}), frozenset()), mixed_layer_norm=False):
        torch.nn.LayerNorm(4)(torch.ones(2, 4))
    assert recorder.calls[-1] == ("layer_norm", (BF16, BF16, BF16))


def test_the_mask_stays_finite_in_bf16():
    from ops.attention import attention_mask

    with Precision(options(), Device()).autocast():
        mask = attention_mask(torch.tensor([[1, 1, 2, 0]]), slots=2)
    assert mask.dtype == BF16
    assert sorted(set(mask.flatten().tolist())) == [-9984.0, 0.0]


def test_losses_and_their_sum_are_fp32_whatever_the_lists_say(tmp_path):
    ops = "add cross_entropy div sum float flatten truediv stack linear matmul layer_norm"
    (tmp_path / "bf16").write_text("\n".join(ops.split()))
    (tmp_path / "fp32").write_text("exp\n")
    precision = Precision(options(bf16_list=tmp_path / "bf16", fp32_list=tmp_path / "fp32"), Device())
    with precision.autocast():
        found = small_model(precision)(small_batch())
    assert {loss.dtype for loss in found.values()} == {FP32}
    assert found["loss"] == found["mlm_loss"] + found["nsp_loss"]
    assert found["mlm_loss"] != found["mlm_loss"].to(BF16), "more digits than bf16 has"


def test_recomputed_layers_take_the_casts_of_the_forward_pass():
    gradients = []
    for checkpoint_activations in (False, True):
        precision = Precision(options(), Device())
        torch.manual_seed(0)
        model = BertForPreTraining(samples.config(vocab_size=99), "plain", checkpoint_activations, precision.autocast,
                                   precision.casts_off)
        torch.manual_seed(1)
        with precision.autocast():
            loss = model(small_batch())["loss"]
        precision.backward(loss)
        gradients.append([param.grad for param in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_verbose_prints_the_types_of_each_op_once(capsys):
    precision = Precision(options(verbose=True), Device())
    for _ in range(2):
        with precision.autocast():
            small_model(precision)(small_batch())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines))
    assert {"linear: bfloat16, bfloat16, bfloat16 -> bfloat16", "layer_norm: bfloat16, float32, float32 -> bfloat16",
            "embedding: float32 -> float32", "cross_entropy: float32 -> float32"} <= set(lines)


def test_without_lists_cpu_takes_autocast_and_lazy_the_default_lists_of_gaudi():
    product = {}
    for device in (Device(), LazyDevice()):
        precision = Precision(options(bf16_list="", fp32_list=""), device)
        one = torch.ones(2, 2).to(device.torch_device)
        with precision.autocast():
            product[device.torch_device.type] = (one @ one, (one / 3.0), precision.describe())
    assert [values[0].dtype for values in product.values()] == [BF16, BF16]
    assert [values[1].dtype for values in product.values()] == [FP32, FP32]
    assert product["cpu"][2] == "bfloat16 autocast" and "Gaudi" in product["lazy"][2]


def test_level_o2_ignores_the_lists():
    assert Precision(options(opt_level="O2", bf16_list="missing"), Device()).describe() == "bfloat16 autocast"


def test_one_list_alone_leaves_the_other_at_gaudis_default(tmp_path):
    (tmp_path / "bf16").write_text("div\nlinear\n")
    recorder = Recorder()
    precision = Precision(options(bf16_list=str(tmp_path / "bf16"), fp32_list=""), Device())
    with recorder, precision.autocast():
        torch.ones(2) / torch.ones(2)
        torch.exp(torch.ones(2, dtype=BF16))
    assert recorder.calls == [("div", (BF16, BF16)), ("exp", (FP32,))]


@pytest.mark.parametrize("bf16, fp32, complaint", [
    ("linear\nlinaer\n", "div\n", "bf16: PyTorch has no op named linaer"),
    ("linear\n\nadd\n", "div\n", "bf16: line 2 is ''"),
    ("linear\n", "div\n   \n", "fp32: line 2 is '   '"),
    ("linear add\n", "div\n", "bf16: line 1 is 'linear add', not the name of one op"),
    ("linear\nadd\n", "div\nadd\n", "both list add"),
    ("truediv\n", "div\n", "both list div"),
    (None, "div\n", "bf16: No such file or directory"),
    (b"\xff\xfe\x00", "div\n", "bf16: not a text file"),
])
def test_faulty_lists_are_refused(tmp_path, bf16, fp32, complaint):
    for name, text in (("bf16", bf16), ("fp32", fp32)):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="--hmp_") as caught:
        Precision(options(bf16_list=str(tmp_path / "bf16"), fp32_list=str(tmp_path / "fp32")), Device())
    assert complaint in str(caught.value) and str(tmp_path) in str(caught.value)


def test_fp16_without_cuda_is_refused():
    with pytest.raises(UserError, match="--fp16 needs CUDA"):
        Precision(options(fp16=True, bf16=False), Device())


@pytest.mark.parametrize("given, after_overflow", [(64.0, 64.0), (0.0, 512.0)])
def test_an_overflow_skips_the_step_and_lowers_no_scale_but_a_dynamic_one(given, after_overflow):
    device = Device()
    device.supports_fp16 = True
    precision = Precision(options(bf16=False, fp16=True, loss_scale=given, init_loss_scale=1024.0), device)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = NVLAMB([weight], lr=0.5)
    precision.backward((weight * float("inf")).sum())
    precision.step(optimizer)
    assert precision.state_dict()["scale"] == after_overflow
    assert torch.equal(weight, torch.ones(3)) and optimizer.skipped_steps == 1
    optimizer.zero_grad()
    precision.backward((weight * 0.1).sum())
    precision.step(optimizer)
    assert weight.detach().tolist() == pytest.approx([0.5] * 3, rel=1e-3), "LAMB moves it by its own length times 0.5"


def test_report_tells_apart_combinations_of_types(capsys):
    with DtypeReport():
        for dtype in (FP32, BF16, FP32):
            torch.tanh(torch.ones(2, dtype=dtype))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("tanh")]
    assert printed == ["tanh: float32 -> float32", "tanh: bfloat16 -> bfloat16"]
