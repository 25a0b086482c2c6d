"""The FLOPs that a batch needs, worked out by hand, and the share of the peak that a log line shows."""

import pytest
import torch

from tests.support import samples
from training import metrics
from training.metrics import Throughput, batch_flops, cpu_peak, matmul_peak

CONFIG = samples.config(hidden_size=6, intermediate_size=10, num_hidden_layers=2, vocab_size=99)  # 104 when padded


def by_hand(lengths, masked: int) -> int:
    weights = 2 * (4 * 6 * 6 + 2 * 6 * 10)  # of two layers
    matmuls = sum(6 * length * weights for length in lengths) + masked * 6 * (6 * 6 + 6 * 104)
    return matmuls + sum(12 * 2 * 6 * length * length for length in lengths)


def test_needed_flops_count_real_tokens_only():
    batch = samples.unpacked_batch([24, 5, 11])
    masked = int((batch["masked_lm_positions"] > 0).sum())
    assert batch_flops(CONFIG, batch) == by_hand([24, 5, 11], masked)


def test_packed_rows_need_what_their_sequences_need():
    batch = samples.unpacked_batch([24, 5, 11, 7])
    packed = samples.packed_batch(batch, [[1, 2, 3], [0]], 26)
    assert batch_flops(CONFIG, packed) == batch_flops(CONFIG, batch)


def test_a_batch_without_sequences_needs_nothing():
    batch = {key: torch.zeros_like(value) for key, value in samples.unpacked_batch([5]).items()}
    assert batch_flops(CONFIG, batch) == 0


def test_utilization_is_the_share_of_the_peak_since_the_last_line():
    throughput = Throughput(peak_flops=1e6)
    for flops in (3e5, 1e5):
        throughput.add_micro_batch(2, 0.0, flops)
        throughput.add_step()
        figures = throughput.read()
        assert figures["model_flops_utilization"] == pytest.approx(flops / figures["average_training_time_step"] / 1e6)
    assert "model_flops_utilization" not in read_without_peak()


def test_a_line_has_the_figures_of_a_micro_batch_and_a_card_and_those_of_a_step_and_all_cards():
    throughput = Throughput(cards=8)
    for sequences in (5, 7, 6, 6):
        throughput.add_micro_batch(sequences, 0.0, 1e5)
    for _ in range(2):
        throughput.add_step()
    figures = throughput.read()
    micro_batch = figures["average_training_time_step"]
    assert figures["step_time"] == pytest.approx(2 * micro_batch)
    assert figures["average_perf_per_step"] * micro_batch == pytest.approx(6)
    assert figures["sequences_per_second"] == pytest.approx(8 * figures["average_perf_per_step"])
    assert throughput.all_sequences == 8 * 24


def read_without_peak() -> dict:
    throughput = Throughput()
    throughput.add_micro_batch(2, 0.0, 1e5)
    throughput.add_step()
    return throughput.read()


def test_a_measured_peak_is_that_of_a_computer():
    assert 1e8 < matmul_peak("cpu", torch.float32, 256, 2) < 1e14


def test_the_peak_of_a_cpu_is_that_of_the_faster_matmul(monkeypatch):
    """Also where the kernels' are the slower ones, and where they cannot be compiled."""
    found = {torch.mm: 3.0}
    monkeypatch.setattr(metrics, "matmul_peak", lambda *_, matmul: found.get(matmul, 5.0))
    assert cpu_peak(256, 2) == 5.0
    found[torch.mm] = 7.0
    assert cpu_peak(256, 2) == 7.0
    monkeypatch.setattr(metrics.cpu_kernels, "unavailable_reason", lambda: "no compiler")
    found[torch.mm] = 3.0
    assert cpu_peak(256, 2) == 3.0
