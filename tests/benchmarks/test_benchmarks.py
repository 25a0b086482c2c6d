"""The benchmarks run and say what they promise, on small sizes; the figures themselves are no matter of tests."""

import json
import sys

import pytest

import gpu
import products
import train_step
from tests.support import samples


@pytest.fixture
def config(tmp_path):
    return str(samples.write_config(tmp_path / "config.json", max_position_embeddings=512))


def run_gpu(capsys, config, *flags) -> dict:
    gpu.main(["--no_cuda", "--config_file", config, "--rows_128=2", "--rows_512=1", "--repeats=2", "--json", *flags])
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_the_gpu_benchmark_checks_and_times_what_needs_no_compiler(capsys, config):
    eager = ["varlen, loss in chunks", "transformers"]
    found = run_gpu(capsys, config, "--variants", *eager)
    assert not [what for what in found["failures"] if "compiled" not in what]
    assert [(step["length"], step["variant"]) for step in found["steps"]] == [
        (length, name) for length in (128, 512) for name in eager]
    for step in found["steps"]:
        assert step["packed"] == (step["length"] == 512 and step["variant"] != "transformers")
        assert step["rows"] == (2 if step["length"] == 128 else 1) <= step["sequences"]
        assert 0 < step["fraction_of_peak"] < 1
        assert step["sequences_per_second"] * step["seconds"]["median"] == pytest.approx(step["sequences"])
    assert {"NVLAMB", "--use_fused_lamb", "AdamW, fused"} <= set(found["lamb"]["seconds"])


def test_the_gpu_benchmark_continues_after_a_variant_that_fails_and_without_transformers(capsys, config, monkeypatch):
    monkeypatch.setitem(gpu.VARIANTS, "sdpa", gpu.Variant({"attention_name": "no such attention"}))
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = run_gpu(capsys, config, "--lengths=128", "--lamb=no", "--variants", "sdpa", "transformers", "plain")
    assert "KeyError" in found["failures"]["128: sdpa"]
    assert "ModuleNotFoundError" in found["failures"]["128: transformers"] and "transformers" not in found["machine"]
    assert [step["variant"] for step in found["steps"]] == ["plain"]


def test_the_training_step_is_compared_with_the_fastest_rival(capsys, monkeypatch):
    monkeypatch.setitem(train_step.SHAPES, "base_packed", (1, 32, 2, 2, 512, 4))
    train_step.main(["--model=base_packed", "--repeats=2", "--json", "--rivals", "eager", "sdpa"])
    found = json.loads(capsys.readouterr().out)
    rivals = {name: seconds["median"] for name, seconds in found["seconds"].items() if name != "ours"}
    assert found["best_rival"] == min(rivals, key=rivals.get)
    assert found["ratio_vs_transformers"] == pytest.approx(min(rivals.values()) / found["seconds"]["ours"]["median"])
    assert found["sequences"] == 8
    train_step.main(["--model=base_packed", "--repeats=2", "--json", "--profile"])
    parts = json.loads(capsys.readouterr().out)["milliseconds"]
    assert all(parts[name] > 0 for name in train_step.KERNELS if name != "zero fills")


def test_the_products_of_a_step_are_all_its_flops_but_those_of_attention(capsys, monkeypatch):
    monkeypatch.setitem(train_step.SHAPES, "mini", (2, 32, 2, 3, 128, 1))
    products.main(["--repeats=1", "--json"])
    found = json.loads(capsys.readouterr().out)
    flops = sum(product["times_a_step"] * product["gflops"]["kernels"] * product["seconds"]["kernels"]["median"]
                for product in found["products"])
    tokens, masked = 3 * 128, 3 * 20
    assert flops * 1e9 == pytest.approx(6 * (tokens * 2 * 12 * 32**2 + masked * 32 * train_step.VOCABULARY))
    assert found["ratio_vs_pytorch"] > 0
