"""The kernels for CPUs against PyTorch's operations.  Without dropout, test_modeling.py compares whole models too."""

import copy
import subprocess
import sys
from dataclasses import make_dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from common.bert_config import BertConfig
from modeling import BertForPreTraining
from ops import cpu_kernels, cpu_layers
from optim.fused_lamb import CpuFusedNVLAMB
from tests.support import samples
from tests.support.busy import busy_processes
from tests.support.ranks import ROOT


@pytest.fixture(scope="module")
def kernels():
    return cpu_kernels.load()


def pair(seed: int = 0, **config) -> tuple[BertForPreTraining, BertForPreTraining]:
    """The same model twice: through the kernels, and through plain operations."""
    torch.manual_seed(seed)
    fast = BertForPreTraining(samples.config(**{"initializer_range": 0.2, **config}), "kernels").train()
    plain = BertForPreTraining(fast.config, "plain").train()
    plain.load_state_dict(fast.state_dict())
    return fast, plain


def dropped_share(seed: int, p: float, kernels, shape=(300, 100)) -> torch.Tensor:
    """Dropout of ones, out of the kernel that adds a residual (here 0) to a product (here 0, with a bias of 1)."""
    rows, columns = shape
    total, nothing, ones = torch.empty(shape), torch.zeros(columns), torch.ones(columns)
    x, weight, residual = torch.zeros(rows, 1), torch.zeros(columns, 1), torch.zeros(shape)
    kernels.dense_residual_norm(x, weight, ones, residual, nothing, nothing, total, torch.empty(shape),
                                torch.empty(rows, 2), rows, columns, 1, 1e-12, p, seed)
    return total


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_everywhere_and_scales_the_rest(kernels, p):
    found = dropped_share(12345, p, kernels)
    assert set(found.unique().tolist()) == {0.0, (1 / (1 - torch.tensor(p))).item()}
    dropped = (found == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    assert abs(dropped.mean().item() - p) < 4.5 * deviation / 30000**0.5
    assert (dropped.mean(0) - p).abs().max() < 5 * deviation / 300**0.5
    assert (dropped.mean(1) - p).abs().max() < 5 * deviation / 100**0.5


def test_dropout_of_different_seeds_and_of_neighbours_is_unrelated(kernels):
    seeds = [7, 8, 7 + 2**32, 2**62 + 7]
    masks = torch.stack([dropped_share(seed, 0.5, kernels).flatten().bool() for seed in seeds]).double() - 0.5
    shifted = torch.stack([masks[0].roll(shift) for shift in (1, 2, 16, 100)])
    correlations = 4 * torch.cat([masks, shifted]) @ masks.T / masks.shape[1]
    assert (correlations[:4].diagonal() == 1).all()
    correlations[:4].fill_diagonal_(0)
    assert correlations.abs().max() < 5 / masks.shape[1]**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_of_any_tensor_drops_its_share_in_its_dtype_and_the_same_of_the_gradient(dtype):
    x = (torch.rand(300, 70, dtype=torch.float64) + 0.5).to(dtype).t().requires_grad_()  # not dense
    out = cpu_layers.dropout(x, 0.1)
    assert out.dtype == dtype and out.shape == x.shape
    kept = out != 0
    assert abs(kept.double().mean().item() - 0.9) < 4.5 * (0.09 / x.numel())**0.5
    assert torch.equal(out, torch.where(kept, (x.float() * (1 / (1 - torch.tensor(0.1)))).to(dtype), 0))
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert torch.equal(gradient, torch.where(kept, (1 / (1 - torch.tensor(0.1))).to(dtype), 0))
    assert not torch.equal(kept, cpu_layers.dropout(x, 0.1) != 0)
    assert cpu_layers.dropout(x, 0.0) is x


def test_dropout_in_bf16_keeps_what_is_not_finite():
    x = torch.full((4, 64), float("nan"), dtype=torch.bfloat16)
    x[1:3] = torch.tensor([[float("inf")], [-float("inf")]])
    out = cpu_layers.dropout(x, 0.1)
    assert out[0].isnan().all() and out[3].isnan().all()  # inf · 0 is NaN, in the others
    assert ((out[1] == float("inf")) | out[1].isnan()).all() and ((out[2] == -float("inf")) | out[2].isnan()).all()


def test_dropout_is_a_function_of_torchs_seed():
    fast, _ = pair()
    batch = samples.unpacked_batch([24, 5, 11])
    losses = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        losses.append(fast(batch)["loss"].item())
    assert losses[0] == losses[2] != losses[1]


def test_gradients_under_dropout_are_those_of_the_loss():
    """Along random directions, against differences of the loss with the same seed."""
    fast, _ = pair(num_hidden_layers=2)
    batch = samples.unpacked_batch([24, 5, 11])

    def loss():
        torch.manual_seed(4)
        return fast(batch)["loss"]

    loss().backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in fast.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator)
        direction *= parameter.grad.abs() > 0  # a weight without effect has none along any direction
        direction += 10 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)  # so that there is much to see
        step = 2e-3 / direction.norm().clamp(min=1e-9)
        with torch.no_grad():
            parameter.add_(direction * step)
            above = loss().double()
            parameter.sub_(2 * step * direction)
            below = loss().double()
            parameter.add_(direction * step)
        measured, told = ((above - below) / (2 * step)).item(), (parameter.grad * direction).sum().item()
        assert measured == pytest.approx(told, rel=0.03, abs=0.01 * direction.norm().item()), name


@pytest.mark.parametrize("form", ["unpacked", "packed"])
def test_twenty_steps_have_the_losses_of_plain_operations(form):
    models = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    lengths = [24, 5, 11, 17, 8, 9]
    found = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for step in range(20):
            batch = samples.unpacked_batch(lengths, seed=step)
            if form == "packed":
                batch = samples.packed_batch(batch, [[0], [1, 3], [2, 4]], 26)
            optimizer.zero_grad()
            loss = model(batch)["loss"]
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert len(set(found[0])) == 20


@pytest.mark.parametrize("values", [(), (0.0,), (-12.0, -5.0, -1e-3, 1e-3, 0.7, 5.0, 12.0, 40.0, -40.0)])
def test_gelu_and_its_gradient_are_pytorchs(kernels, values):
    expected_inner = torch.tensor([values], requires_grad=True)
    expected = F.gelu(expected_inner)
    expected.sum().backward()
    count = len(values)
    inner, out, d_inner, d_bias = torch.empty(4, 1, count)
    one = torch.ones(1, 1)
    kernels.dense_gelu(torch.zeros(1, 1), torch.zeros(count, 1), torch.tensor(values), inner, out, 1, count, 1)
    kernels.gelu_backward(one, torch.ones(1, count), inner, d_inner, d_bias, 1, count, 1)
    assert_close(out, expected.detach(), atol=3e-7, rtol=1e-6)
    assert_close(d_inner, expected_inner.grad, atol=5e-7, rtol=1e-6)
    assert_close(d_bias, d_inner)


SIZES = st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 257, 530, 1056]))


@settings(deadline=None, max_examples=100)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.sampled_from(["", "bias", "into"]), st.integers(1, 5))
def test_products_of_any_size_are_those_of_fp64(rows, columns, depth, a_transposed, b_transposed, start, threads):
    a, b = (torch.randn(shape[::-1]).t() if transposed else torch.randn(shape)
            for shape, transposed in (((rows, depth), a_transposed), ((depth, columns), b_transposed)))
    bias, into = torch.randn(columns), torch.randn(rows, columns)
    expected = a.double() @ b.double() + {"": 0, "bias": bias, "into": into}[start]
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = cpu_layers.matmul(a, b, bias if start == "bias" else None, into if start == "into" else None)
    torch.set_num_threads(usual)
    assert_close(found.double(), expected, rtol=0, atol=2e-6 * depth**0.5 * 6)
    assert start != "into" or found is into


def results_of_a_step() -> list[torch.Tensor]:
    """What the kernels compute of embeddings, layer, loss and LAMB, in several blocks of B and many parts."""
    model, _ = pair(3, hidden_size=160, intermediate_size=1100, num_hidden_layers=1, num_attention_heads=2)
    batch = samples.unpacked_batch([24, 5, 11, 17] * 12)
    embeddings, (layer,) = model.bert.embeddings, model.bert.encoder.layer
    hidden = layer(embeddings(batch["input_ids"], batch["segment_ids"], batch["positions"]), batch["input_mask"])
    loss = cpu_layers.kernel_cross_entropy(hidden.flatten(0, 1), embeddings.word_embeddings.weight,
                                           model.cls.predictions.bias, batch["input_ids"].long().flatten())
    loss.backward()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    optimizer = CpuFusedNVLAMB(parameters, lr=0.1)
    optimizer.step()
    return [loss.detach(), hidden.detach(), *(parameter.grad for parameter in parameters),
            *(parameter.detach() for parameter in parameters)]


def allowed_cpus() -> set[str]:
    """The CPUs on which the threads of this process may run, as masks: of all threads the same ones."""
    return {status.read_text().split("Cpus_allowed:")[1].split()[0]
            for status in Path("/proc").glob("self/task/*/status")}


def test_results_are_the_same_bits_on_any_number_of_threads_quiet_and_busy():
    """And the threads, which part ways while they work, may go where they might before."""
    usual, before, expected = torch.get_num_threads(), allowed_cpus(), None
    for busy, threads in [(0, 1), (0, 2), (0, 5), (2, 2), (2, 3)]:
        torch.set_num_threads(threads)
        with busy_processes(busy):
            found = results_of_a_step()
        expected = expected or found
        assert len(found) > 30
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            assert torch.equal(one, other), f"result {number}, {threads} threads beside {busy} processes"
    torch.set_num_threads(usual)
    assert allowed_cpus() == before


BEFORE_FORBIDDEN_PAGES = """
import ctypes, itertools, mmap
import numpy, torch
from ops import cpu_layers

def factor(rows, columns):
    size = 4 * rows * columns
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, end + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + end
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return torch.from_numpy(numpy.frombuffer(memory, numpy.float32, rows * columns, end - size).reshape(rows, columns))

for rows, columns, depth in itertools.product((1, 15, 17, 40, 200), (1, 31, 40, 200), (1, 15, 17, 40, 300)):
    firsts, seconds = ((factor(*shape), factor(*shape[::-1]).t()) for shape in ((rows, depth), (depth, columns)))
    for a, b in itertools.product(firsts, seconds):
        a.normal_(), b.normal_()
        torch.testing.assert_close(cpu_layers.matmul(a, b), a @ b, rtol=0, atol=1e-4)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are forbidden by Linux's mprotect")
def test_products_read_nothing_behind_their_factors():
    subprocess.run([sys.executable, "-c", BEFORE_FORBIDDEN_PAGES], check=True, cwd=ROOT)


def test_products_of_parts_of_wider_matrices_read_their_part_alone():
    wide = torch.full((40, 100), float("nan"))
    wide[:, 30:60] = torch.randn(40, 30)
    part = wide[:, 30:60]
    assert_close(cpu_layers.matmul(part, part.t()), part @ part.t())
    assert_close(cpu_layers.matmul(part.t(), part), part.t() @ part)


@pytest.mark.parametrize("lengths", [[300], [129, 171], [40, 100, 127, 8], [5, 5, 290]])
def test_attention_over_many_blocks_of_queries_is_the_plain_one(lengths):
    """Sequences that begin and end inside of blocks, and padding behind them."""
    fast, plain = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=512)
    batch = samples.packed_batch(samples.unpacked_batch(lengths, sequence_length=300), [list(range(len(lengths)))], 310)
    for model in (fast, plain):
        model(batch)["loss"].backward()
    for (name, found), expected in zip(fast.named_parameters(), plain.parameters(), strict=True):
        assert_close(found.grad, expected.grad, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_layers_wider_than_a_block_of_a_product_are_the_plain_ones():
    """Heads too: 528 wide."""
    fast, plain = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.02,
                       hidden_size=1056, intermediate_size=1100, num_attention_heads=2, num_hidden_layers=1)
    batch = samples.unpacked_batch([24, 5, 11])
    for model in (fast, plain):
        model(batch)["loss"].backward()
    for (name, found), expected in zip(fast.named_parameters(), plain.parameters(), strict=True):
        tolerance = 1e-4 * expected.grad.abs().max().item() + 1e-7
        assert_close(found.grad, expected.grad, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("key", ["input_ids", "segment_ids", "positions"])
@pytest.mark.parametrize("value", [-1, 10**6])
def test_an_index_out_of_its_table_is_refused(key, value):
    fast, _ = pair()
    batch = samples.unpacked_batch([9, 7])
    batch[key][1, 2] = value
    with pytest.raises(IndexError, match="out of the range"):
        fast(batch)


def test_loss_of_extreme_scores_is_finite_and_pytorchs():
    hidden = torch.tensor([[1.0], [-1.0], [30.0], [0.5]], requires_grad=True)
    weight = torch.tensor([[100.0], [-100.0], [3.0], [0.0], [1.0]], requires_grad=True)
    bias = torch.tensor([0.5, -0.5, 0.0, 0.0, 2.0], requires_grad=True)
    labels = torch.tensor([0, 0, 2, -1])
    results = []
    for loss in (cpu_layers.kernel_cross_entropy(hidden, weight, bias, labels),
                 F.cross_entropy(F.linear(hidden, weight, bias), labels, ignore_index=-1)):
        results.append([loss.detach(), *torch.autograd.grad(3.0 * loss, [hidden, weight, bias])])
    for found, expected in zip(*results, strict=True):
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_nan_in_the_weights_is_a_nan_in_the_loss():
    fast, _ = pair()
    with torch.no_grad():
        fast.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    assert fast(samples.unpacked_batch([9, 7]))["loss"].isnan()


def test_a_copied_model_and_one_in_evaluation_use_the_kernels_alike():
    fast, plain = (model.eval() for model in pair())
    batch = samples.unpacked_batch([24, 5, 11])
    with torch.no_grad():
        expected = plain(batch)["loss"]
        assert_close(fast(batch)["loss"], expected, rtol=1e-5, atol=1e-5)
        assert_close(copy.deepcopy(fast)(batch)["loss"], expected, rtol=1e-5, atol=1e-5)


def test_tensors_that_a_kernel_cannot_read_are_refused(kernels):
    wide = torch.zeros(4, 6)
    for tensor in (wide.bfloat16(), torch.zeros(6, 4).t()):
        with pytest.raises(AssertionError, match="dense_gelu"):
            kernels.dense_gelu(tensor, torch.zeros(6, 6), torch.zeros(6), wide, wide, 4, 6, 6)
    with pytest.raises(AssertionError, match="bfloat16"):
        cpu_layers.matmul(wide.bfloat16(), wide.t())


def test_the_kernels_take_no_config_that_they_do_not_wholly_follow():
    assert cpu_layers.unsupported_reason(samples.config()) is None
    assert cpu_layers.unsupported_reason(samples.config(hidden_act="relu")) == "no kernel for relu"
    rotary = make_dataclass("RotaryConfig", [("position_scheme", str, "rotary")], bases=(BertConfig,), frozen=True)
    assert cpu_layers.unsupported_reason(rotary(**samples.TINY)) == "no kernel for position_scheme"
    with pytest.raises(AssertionError):
        BertForPreTraining(rotary(**samples.TINY), "kernels")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Kernels that have to be compiled anew."""
    monkeypatch.setenv("BERT_CACHE_DIR", str(tmp_path))
    cpu_kernels.load.cache_clear()
    yield tmp_path
    cpu_kernels.load.cache_clear()


def test_without_a_compiler_the_reason_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert cpu_kernels.unavailable_reason() == "no C++ compiler no-such-compiler (CXX names another)"


def test_a_compiler_that_fails_leaves_nothing_and_is_named(fresh, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert "false: exit code 1" in cpu_kernels.unavailable_reason()
    assert not [path for path in fresh.rglob("*") if path.is_file()]


def test_kernels_are_compiled_once(fresh):
    cpu_kernels.load()
    (path,) = fresh.rglob("*.so")
    before = path.stat().st_mtime_ns
    cpu_kernels.load.cache_clear()
    cpu_kernels.load()
    assert [path] == list(fresh.rglob("*.so")) and path.stat().st_mtime_ns == before


def test_torchs_openmp_library_is_found_in_a_folder_with_a_space(fresh, monkeypatch):
    (library,) = cpu_kernels.openmp_library()
    link = fresh / "new user" / "libgomp.so.1"
    link.parent.mkdir()
    link.symlink_to(library)
    maps = f"7f00-7f10 r-xp 00000000 08:01 42    {link}\n"
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **options: maps if str(self) == "/proc/self/maps" else
                        read(self, **options))
    assert cpu_kernels.openmp_library() == [str(link)]
    assert cpu_kernels.unavailable_reason() is None


def test_a_damaged_library_is_named(fresh):
    cpu_kernels.load()
    (path,) = fresh.rglob("*.so")
    damaged = path.with_name("damaged.so")
    damaged.write_bytes(path.read_bytes()[:100])
    with pytest.raises(cpu_kernels.KernelsMissing, match="damaged.so"):
        cpu_kernels.Kernels(damaged)
