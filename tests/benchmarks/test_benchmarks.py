"""The benchmarks run and say what they promise, on small sizes; the figures themselves are no matter of tests."""

import json
import random
import sys
from importlib.util import find_spec

import pytest
import torch

import changed_training
import data_preparation
import gpu
import products
import quickstart_data
import quickstart_sweep
import race
import segmented_training
import start_up
import time_to_quality
import train_step
from modeling import BertForPreTraining
from tests.support import preparation, samples, small_run


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


@pytest.fixture(scope="module")
def quickstart_output(tmp_path_factory):
    """A folder with text shards, as quickstart.sh leaves them."""
    output, draw = tmp_path_factory.mktemp("quickstart"), random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=5)) for _ in range(300)]
    folder = output / "data" / "sharded_training_shards_1_test_shards_1_fraction_0.1" / quickstart_data.DATASET
    folder.mkdir(parents=True)
    for split, documents in (("training", 40), ("test", 6)):
        sentences = [" ".join(draw.choices(words, k=12)) + "." for _ in range(8 * documents)]
        text = "\n\n".join("\n".join(sentences[start:start + 8]) for start in range(0, len(sentences), 8))
        (folder / f"{quickstart_data.DATASET}_{split}_0.txt").write_text(text + "\n")
    return output


def run_sweep(capsys, output, *flags) -> dict:
    quickstart_sweep.main([f"--data={output}", "--json", *flags])
    return json.loads(capsys.readouterr().out)


def test_the_sweep_changes_one_thing_at_a_time_and_trains_on_as_many_tokens():
    runs = quickstart_sweep.planned_runs(quickstart_sweep.parse_arguments(["--seeds=2"]))
    assert len({run.key for run in runs}) == len(runs)
    assert [run.factor for run in runs].count("quickstart") == 2
    for factor, values in quickstart_sweep.FACTORS.items():
        assert list(values.values()).count(quickstart_sweep.SAME) == (factor != "phase2_length")
    for run in runs:
        share = 9 / 16 if run.settings.phase2 else 1
        assert run.tokens == pytest.approx(share * 3200 * 1024, rel=0.01), run.name
    with_other_rows = [run for run in runs if run.factor == "row_length"]
    assert all(run.steps == pytest.approx(3200, rel=0.01) for run in with_other_rows)


@pytest.mark.slow
def test_the_sweep_tells_how_far_below_the_line_each_run_ends_and_repeats_none(capsys, monkeypatch, quickstart_output):
    factors = ("nsp_weight", "phase2_length")
    monkeypatch.setattr(quickstart_sweep, "FACTORS", {name: quickstart_sweep.FACTORS[name] for name in factors})
    monkeypatch.delitem(quickstart_sweep.FACTORS["phase2_length"], "128")
    found = run_sweep(capsys, quickstart_output, "--budget=4096")
    assert not found["failures"]
    assert [(row["factor"], row["value"], row["is_quickstart"], row["steps"]) for row in found["factors"]] == [
        ("nsp_weight", "0", False, 4), ("nsp_weight", "1", True, 4), ("phase2_length", "64", False, 2)]
    for row in found["factors"]:
        assert row["below"]["median"] == pytest.approx(row["line"] - row["mlm_loss"])
        assert row["tokens_until_off"] is None
    assert found["factors"][0]["mlm_loss"] != found["factors"][1]["mlm_loss"]

    monkeypatch.setattr(quickstart_sweep, "train_in_child", None)  # a second start trains nothing
    assert run_sweep(capsys, quickstart_output, "--budget=4096")["factors"] == found["factors"]
    quickstart_sweep.main([f"--data={quickstart_output}", "--budget=4096", "--only=nsp_weight"])
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:]] == ["nsp_weight", "nsp_weight", "*"] and "1 *" in table[3]


def test_an_interrupted_sweep_keeps_the_runs_before_and_a_failed_run_does_not_end_it(capsys, monkeypatch, tmp_path):
    figures = {"steps": 2, "seconds": 1.0, "mlm_loss": 5.0, "line": 5.5, "below": 0.5, "mlm_accuracy": 0.2,
               "nsp_accuracy": 0.5, "nsp_larger_class": 0.5, "tokens_until_off": 1024, "curve": []}

    def trained(run, output, bar):
        if run.factor == "heads":
            raise quickstart_sweep.UserError("no such heads")
        if run.factor == "warmup":
            raise KeyboardInterrupt
        return figures

    monkeypatch.setattr(quickstart_sweep, "trained", trained)
    flags = [f"--data={tmp_path}", "--json", "--budget=4096", "--only", "beta2", "heads", "warmup"]
    with pytest.raises(KeyboardInterrupt):
        quickstart_sweep.main(flags)
    assert len(json.loads((tmp_path / "benchmarks/sweep/results.json").read_text())) == 2
    monkeypatch.setattr(quickstart_sweep, "trained", lambda run, output, bar: {**figures, "below": 0.7})
    quickstart_sweep.main(flags)
    rows = {(row["factor"], row["value"]): row["below"]["median"]
            for row in json.loads(capsys.readouterr().out)["factors"]}
    assert rows["beta2", "0.98"] == rows["beta2", "0.999"] == 0.5
    assert rows["heads", "2"] == rows["warmup", "0.05"] == 0.7


@pytest.mark.parametrize("changes", [{"nsp_weight": 0.25}, {"beta2": 0.5}])
def test_a_training_can_be_changed_where_it_has_no_flag(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(small_run.write_workspace(tmp_path))
    logs = {}
    for name, chosen in (("plain", {}), ("changed", changes), ("again", {})):
        flags = small_run.flags(output_dir=name, json_summary=f"{name}.json", skip_checkpoint=True, log_freq=1)
        changed_training.main([json.dumps(chosen), *flags])
        logs[name] = small_run.logged_steps(tmp_path / f"{name}.json")
    assert logs["plain"] == logs["again"] != logs["changed"]
    last = logs["changed"][6]
    weight = changes.get("nsp_weight", 1.0)
    assert last["step_mean_loss"] == pytest.approx(last["mlm_loss"] + weight * last["nsp_loss"], rel=1e-5)


def test_the_rival_starts_from_our_weights_and_is_evaluated_with_its_own():
    config = samples.config(vocab_size=1000, max_position_embeddings=128)
    ours = BertForPreTraining(config, "plain").eval()
    rival = segmented_training.rival_model(ours, "eager").eval()
    batch = train_step.random_batch(3, 128, 1, 1000)
    assert train_step.transformers_loss(rival, batch)().item() == pytest.approx(ours(batch)["loss"].item(), rel=1e-5)
    with torch.no_grad():
        for weight in rival.parameters():
            weight.add_(0.01 * torch.randn_like(weight))
    evaluated = segmented_training.with_weights_of(BertForPreTraining(config, "plain").eval(), rival)
    loss = evaluated(batch)["loss"].item()
    assert train_step.transformers_loss(rival, batch)().item() == pytest.approx(loss, rel=1e-5)
    assert loss != pytest.approx(ours(batch)["loss"].item(), rel=1e-5)


def test_the_rivals_rate_warms_up_and_falls_linearly():
    settings = segmented_training.RivalSettings(config_file="", input_dir="", counts_dir="", eval_dir="", rows=1,
                                                every=1, seed=1, learning_rate=1.0, steps=100)
    assert [settings.rate_of(step) for step in (1, 10, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])


def test_the_seconds_to_a_mark_lie_between_two_evaluations_and_a_missed_mark_bounds_the_ratio():
    points = [{"seconds": 2.0, "mlm_loss": 7.0}, {"seconds": 4.0, "mlm_loss": 6.0}, {"seconds": 6.0, "mlm_loss": 6.5}]
    assert race.seconds_at(points, 6.25) == 3.5 and race.seconds_at(points, 5.9) is None
    pairs = [[{"seconds": 9.0, "seconds_to": {"0.3": 4.0}}, {"seconds": 20.0, "seconds_to": {"0.3": seconds}}]
             for seconds in (10.0, 8.0, 16.0)]
    found = time_to_quality.compare_at(0.3, pairs)
    assert found["time_ratio"] == found["time_ratio_at_most"] == 0.4 and found["transformers_spread"]["max"] == 16.0
    pairs[0][1]["seconds_to"]["0.3"] = None
    found = time_to_quality.compare_at(0.3, pairs)
    assert found["time_ratio"] is None and found["time_ratio_at_most"] == 4 / 16
    pairs[0][0]["seconds_to"]["0.3"] = None
    assert time_to_quality.compare_at(0.3, pairs)["time_ratio_at_most"] is None


@pytest.mark.slow
def test_time_to_quality_compares_with_the_best_recipe_of_transformers_and_draws(capsys, monkeypatch, tmp_path,
                                                                                quickstart_output):
    monkeypatch.setattr(time_to_quality, "MARKS", (-50.0, 0.3, 1.0))  # the first is passed at once
    time_to_quality.main([f"--data={quickstart_output}", "--json", "--seeds=1", "--steps=4", "--every=2",
                          "--rates", "0.001", "0.01", "--rows", "128", "--packing_steps=2",
                          f"--plot={tmp_path / 'curves.png'}"])
    found = json.loads(capsys.readouterr().out)
    quality, packing = found["transformers"], found["packing"]
    assert [(tried["rate"], tried["rows"], tried["steps"]) for tried in quality["choice"][:2]] == [
        (0.001, 64, 4), (0.01, 64, 4)]
    assert (quality["choice"][2]["rows"], quality["choice"][2]["steps"]) == (128, 2)
    best = max(quality["choice"], key=lambda tried: tried["last_below"])
    assert (quality["rate"], quality["rows"]) == (best["rate"], best["rows"])
    (pair,) = quality["pairs"]
    assert pair["ours"]["line"] == pytest.approx(pair["transformers"]["line"])
    first, missed, _ = quality["marks"]
    assert first["time_ratio"] == pytest.approx(first["ours"][0] / first["transformers"][0])
    assert missed["ours"] == [None] and missed["time_ratio_at_most"] is None
    for side in pair.values():
        seconds = [point["seconds"] for point in side["curve"]]
        assert seconds == sorted(seconds) and side["curve"][-1]["trained_sequences"] == 256
    assert packing["packed"]["sequences_per_step"] == pytest.approx(16, rel=0.15)
    assert packing["unpacked"]["sequences_per_step"] == 16 and packing["sequences_per_row"] > 1
    assert packing["speed_ratio"] > 0 and (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_stages_of_a_start_are_all_of_it(tmp_path):
    start_up.write_data(tmp_path)
    found = start_up.training_start(start_up.ROOT, tmp_path)
    assert all(seconds > 0 for seconds in found.values())
    assert found["imports"] + found["building"] + found["step"] == pytest.approx(found["total"])


def test_a_training_that_fails_is_named():
    contestant = race.Contestant("no such files", "ours", ["--do_train", "--input_dir=no/such", "--output_dir=none",
                                                          "--config_file=no.json"])
    with pytest.raises(race.UserError, match="no such files: ended with exit code 2: .*no/such"):
        race.race([contestant], None, 1.0, "test")


def test_extraction_is_timed_on_articles_alone_and_compared_where_the_other_is_installed(tmp_path):
    dump = preparation.write_dump(tmp_path / "x.xml.bz2", [
        preparation.page("A", "[[b|c]] d"), preparation.page("B", "#REDIRECT [[A]]", redirect=True),
        preparation.page("Template:C", "{{{1}}}", namespace=10)])
    figures = data_preparation.extraction(dump, repeats=1)
    assert figures["wikitext_mb"] == pytest.approx(9e-6)
    assert figures.get("same_paragraphs", 1) == 1 and "wikitext.py" in data_preparation.extraction_lines(figures)[0]
    assert ("wikiextractor" in figures) == (find_spec("wikiextractor") is not None)
