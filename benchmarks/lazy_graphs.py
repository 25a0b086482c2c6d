"""What a lazy device has to do in training: graphs run, graphs compiled, values fetched, ops that were not lowered.

Runs the training command on PyTorch's own lazy device with a small BERT, on packed and unpacked rows, in fp32 and with
the op lists, 2 accumulation steps; log lines and dropout as in a real run.  The figures are the worst of all steps.

    python benchmarks/lazy_graphs.py [--json]
"""

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from measuring import ROOT, machine, report  # puts the repository's root on the path

# isort: split
from common import cli

SEQUENCE_LENGTH, PREDICTIONS, ROWS = 32, 5, 3
STEPS, ACCUMULATION_STEPS, SETTLED_STEP = 8, 2, 3
CONFIG = {"attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 32,
          "initializer_range": 0.02, "intermediate_size": 48, "max_position_embeddings": 40, "num_attention_heads": 4,
          "num_hidden_layers": 2, "type_vocab_size": 2, "vocab_size": 30522}
PRECISIONS = {"fp32": [], "op lists": ["--hmp", f"--hmp_bf16={ROOT / 'ops_bf16_bert_pt.txt'}",
                                       f"--hmp_fp32={ROOT / 'ops_fp32_bert_pt.txt'}"]}


def main(argv=None) -> None:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    figures = {"runs": all_runs(), "machine": machine()}
    report(figures, args.json, [
        f"{run['data']:9s}{run['precision']:9s} graphs: {run['graphs_per_micro_step']} a micro-step, "
        f"{run['graphs_per_optimizer_step']} an optimizer step; host fetches {run['host_fetches_between_logs']}; "
        f"compiles after step {SETTLED_STEP}: {run['compiles_after_step_3']}; "
        f"not lowered: {' '.join(run['unlowered_ops']) or 'none'}"
        for run in figures["runs"]])


def all_runs() -> list[dict]:
    """The figures of each combination of data and precision."""
    with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        data = write_data(Path(folder))
        return [{"data": name, "precision": precision, **counted_run(Path(folder), name, sequences_per_row, flags)}
                for name, sequences_per_row in data.items() for precision, flags in PRECISIONS.items()]


def write_data(folder: Path) -> dict[str, float]:
    """Folders of rows, unpacked and packed, and a config: {name of the folder: sequences a row}."""
    import numpy as np

    import pack_pretraining_data_pytorch
    from tests.support.synthetic import write_unpacked_shard

    lengths = np.random.default_rng(0).integers(5, SEQUENCE_LENGTH + 1, 60)
    write_unpacked_shard(folder / "unpacked" / "sample_training_0.hdf5", lengths, 0, SEQUENCE_LENGTH, PREDICTIONS)
    pack_pretraining_data_pytorch.main([
        f"--input_dir={folder / 'unpacked'}", f"--output_dir={folder / 'packed'}", "--disable_progress_bar",
        f"--max_sequence_length={SEQUENCE_LENGTH}", f"--max_predictions_per_sequence={PREDICTIONS}"])
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    metadata = json.loads((folder / "packed_metadata.json").read_text(encoding="utf-8"))
    return {"unpacked": 1.0, "packed": metadata["avg_seq_per_sample"]}


def counted_run(folder: Path, data: str, sequences_per_row: float, flags: list[str]) -> dict:
    """Train, with the lazy device's counters read before each step and after each mark_step of it."""
    import run_pretraining
    from devices.lazy import LazyDevice
    from training.trainer import Trainer

    mark_step, train_step, readings = LazyDevice.mark_step, Trainer.train_step, []

    def counted_mark_step(device):
        mark_step(device)
        readings[-1].append(counters())

    def counted_train_step(trainer, step):
        readings.append([counters()])
        return train_step(trainer, step)

    asked = round(ACCUMULATION_STEPS * sequences_per_row)  # a packed row counts for its sequences
    with mock.patch.object(LazyDevice, "mark_step", counted_mark_step), \
            mock.patch.object(Trainer, "train_step", counted_train_step):
        run_pretraining.main([
            "--do_train", "--use_torch_lazy", f"--input_dir={folder / data}", f"--output_dir={folder / 'none'}",
            f"--config_file={folder / 'config.json'}", f"--json_summary={folder / 'log.json'}", "--skip_checkpoint",
            f"--max_seq_length={SEQUENCE_LENGTH}", f"--max_predictions_per_seq={PREDICTIONS}",
            f"--train_batch_size={ROWS * asked}", f"--gradient_accumulation_steps={asked}", "--warmup_proportion=0.3",
            "--learning_rate=0.01", f"--max_steps={STEPS}", "--log_freq=2", "--disable_progress_bar", *flags])
    assert all(len(step) == ACCUMULATION_STEPS + 2 for step in readings), "not 2 micro-steps and an optimizer step"
    return summary(readings)


def counters() -> dict[str, int]:
    import torch

    return {name: torch._lazy.metrics.counter_value(name) for name in torch._lazy.metrics.counter_names()}


def summary(readings: list[list[dict]]) -> dict:
    """The figures of a run from its counters: before a step, then after each of its mark_steps."""
    def graphs(before: dict, after: dict) -> int:
        return sum(after.get(name, 0) - before.get(name, 0) for name in ("UncachedCompile", "CachedCompile"))

    def fetches(reading: dict) -> int:
        return reading.get("aten::_local_scalar_dense", 0)

    settled, last = readings[SETTLED_STEP][0], readings[-1][-1]
    return {
        "graphs_per_micro_step": max(graphs(*pair) for step in readings
                                     for pair in zip(step[:-2], step[1:-1], strict=True)),
        "graphs_per_optimizer_step": max(graphs(step[-2], step[-1]) for step in readings),
        "host_fetches_between_logs": sum(fetches(step[-1]) - fetches(step[0]) for step in readings),
        "compiles_after_step_3": last["UncachedCompile"] - settled["UncachedCompile"],
        "unlowered_ops": sorted(name for name, count in last.items() if name.startswith("aten::")
                                and name != "aten::_local_scalar_dense" and count > readings[0][0].get(name, 0))}


if __name__ == "__main__":
    cli.run(main)
