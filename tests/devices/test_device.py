"""A device's own software: used where found, reported in one line where missing, named in devices/ alone."""

import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from devices.cuda import CudaDevice
from devices.device import select_device
from devices.hpu import HpuDevice
from devices.options import DeviceOptions
from lamb import NVLAMB
from optim.build import OptimizerOptions, build_optimizer
from tests.support import gaudi

FLAGS = ["run_pretraining.py", "--do_train", "--input_dir=nowhere", "--output_dir=nowhere", "--config_file=nowhere",
         "--use_habana"]
FUSED = OptimizerOptions(learning_rate=0.1, use_fused_lamb=True)


@pytest.mark.parametrize("changes, complaint", [
    ({"cards": 0}, "Gaudi's software is installed, but it finds no card"),
    ({"PYTHONPATH": ""}, "no HPU can be used: No module named 'habana_frameworks'"),
])
def test_missing_software_and_missing_cards_are_each_reported_in_one_line(changes, complaint):
    done = gaudi.run(FLAGS, **changes)
    assert done.returncode == 2 and complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_only_the_devices_folder_names_a_devices_own_software():
    for path in gaudi.ROOT.glob("**/*.py"):
        relative = path.relative_to(gaudi.ROOT)
        if relative.parts[0] in ("tests", "benchmarks", ".venv", "devices"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)]
            names.append(getattr(node, "module", None) or "")
            assert not any(name.split(".")[0] == "habana_frameworks" for name in names), relative
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("cuda", "hpu"), f"{relative}:{node.lineno}"


def hpu(lazy: bool = True, metric=None) -> HpuDevice:
    """An HpuDevice on a machine that has none, of a release that lacks everything optional."""
    device = HpuDevice.__new__(HpuDevice)
    device.torch_device, device.lazy, device.hmp, device.metric = torch.device("hpu"), lazy, None, metric
    device.core = SimpleNamespace(mark_step=lambda: marks.append(1))
    marks = device.marks = []
    return device


def test_marks_reach_the_software_in_lazy_mode_alone():
    for lazy in (True, False):
        device = hpu(lazy)
        device.mark_step()
        assert len(device.marks) == lazy


def test_releases_without_metrics_or_their_names_count_nothing():
    assert hpu().graphs() == {"graph_compilation": 0, "cpu_fallback": 0, "cpu_fallback_ops": ""}
    assert hpu(metric=lambda name: None).graphs()["graph_compilation"] == 0
    stats = SimpleNamespace(stats=lambda: [("TotalNumber", 7), ("FallbackOps", "aten::nonzero"), ("AvgTime", 1.5)])
    assert hpu(metric=lambda name: stats).graphs() == {"graph_compilation": 7, "cpu_fallback": 7,
                                                       "cpu_fallback_ops": "aten::nonzero"}


def test_a_release_without_fused_lamb_gets_nvlamb_and_the_reason():
    optimizer, description = build_optimizer(torch.nn.Linear(3, 2), hpu(), FUSED)
    assert isinstance(optimizer, NVLAMB) and "hpu has no FusedLamb" in description


def test_fused_lamb_is_made_as_its_signature_says(monkeypatch):
    class FusedLamb:
        def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01,
                     amsgrad=False, adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0,
                     use_lamb=False, fused=False, dtype=None):
            self.param_groups = params
            self.made_with = {key: value for key, value in locals().items() if key != "self"}

    monkeypatch.setitem(sys.modules, "habana_frameworks.torch.hpex.optimizers", SimpleNamespace(FusedLamb=FusedLamb))
    for name in ("habana_frameworks", "habana_frameworks.torch", "habana_frameworks.torch.hpex"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    model = torch.nn.Linear(3, 2)
    for asked, expected in ((True, FusedLamb), (False, NVLAMB)):
        options = OptimizerOptions(learning_rate=0.1, use_fused_lamb=asked)
        assert isinstance(build_optimizer(model, hpu(), options)[0], expected)
    made_with = build_optimizer(model, hpu(), FUSED)[0].made_with
    assert [group["weight_decay"] for group in made_with["params"]] == [0.01, 0.0]
    assert (made_with["lr"], made_with["eps"], made_with["max_grad_norm"]) == (0.1, 1e-6, 1.0)
    assert made_with["use_lamb"] is False


def test_a_device_that_is_asked_for_is_the_one_that_is_taken():
    for lazy, kind in ((False, "cpu"), (True, "lazy")):
        assert select_device(DeviceOptions(use_torch_lazy=lazy, no_cuda=True)).torch_device.type == kind


ALL_REDUCE = """
import os, sys, torch
import torch.distributed as dist
from devices.hpu import HpuDevice
device = HpuDevice(lazy=True)
device.register_backend()
rank = int(os.environ["RANK"])
dist.init_process_group(device.backend, init_method="file://" + sys.argv[1], rank=rank, world_size=2)
value = torch.full((5,), rank + 1.0).to(device.torch_device)
dist.all_reduce(value * 2.0)  # of something that is not computed yet
total = value * 2.0
dist.all_reduce(total)
dist.broadcast(value, src=1)
gathered = [torch.zeros(5).to(device.torch_device) for _ in range(2)]
dist.all_gather(gathered, total + rank)
halves = torch.zeros(3).to(device.torch_device)
dist.reduce_scatter_tensor(halves, (torch.arange(6.0) + rank).to(device.torch_device))
whole = torch.zeros(6).to(device.torch_device)
dist.all_gather_into_tensor(whole, halves)
print(total.tolist(), value.tolist(), [part.tolist() for part in gathered], halves.tolist(), whole.tolist())
try:
    dist.all_reduce(value, op=dist.ReduceOp.AVG)
except RuntimeError as error:
    print(error)
"""


DENORMALS = """
from common.errors import UserError
from devices.cuda import CudaDevice
from devices.device import select_device
from devices.options import DeviceOptions
select_device(DeviceOptions(no_cuda=True))
import torch
torch.set_num_threads(2)
product = torch.full((1 << 20,), 1e-20) * 1e-20
from ops import cpu_layers, cpu_kernels
a = torch.full((512, 512), 1e-20)
gemm = a @ a if cpu_kernels.unavailable_reason() else cpu_layers.matmul(a, a)
print(int(torch.count_nonzero(product)), int(torch.count_nonzero(gemm)))
"""


def test_denormal_numbers_are_zero_in_every_thread_of_the_cpu():
    done = subprocess.run([sys.executable, "-c", DENORMALS], capture_output=True, text=True, cwd=gaudi.ROOT)
    assert done.stdout.split() == ["0", "0"], done.stderr


def test_collectives_over_hccl_reduce_lazy_tensors(tmp_path):
    words = [sys.executable, "-c", ALL_REDUCE, str(tmp_path / "store")]
    ranks = [gaudi.start(words, PT_HPU_LAZY_MODE="1", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
             for rank in range(2)]
    for rank, process in enumerate(ranks):
        printed, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        total, broadcast, gathered = [6.0] * 5, [2.0] * 5, [[6.0] * 5, [7.0] * 5]
        whole = [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]
        half = whole[3 * rank:3 * rank + 3]
        assert printed.splitlines() == [f"{total} {broadcast} {gathered} {half} {whole}", "HCCL has no ReduceOp.AVG"]


@pytest.mark.parametrize("cards, variables, device", [
    (8, {}, "cuda:3"), (8, {"SLURM_STEP_NUM_TASKS": "8"}, "cuda:3"),
    (1, {"SLURM_STEP_NUM_TASKS": "8"}, "cuda:0"),  # srun --gpus-per-task=1
    (1, {}, None),
])
def test_a_rank_takes_the_cuda_card_of_its_number_among_those_it_sees(monkeypatch, cards, variables, device):
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(matmul=SimpleNamespace()))
    if device:
        assert str(CudaDevice(3).torch_device) == device
    else:
        with pytest.raises(UserError, match="local rank 3, but only 1 CUDA devices"):
            CudaDevice(3)
