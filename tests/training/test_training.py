"""Whole runs of run_pretraining.py on small data: what is trained, logged, saved, and refused."""

import json
import math
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch

import evaluate
import run_pretraining
from common.errors import UserError
from data.shards import find_shards, read_rows
from ops import cpu_kernels
from optim.lr_schedule import learning_rate
from tests.support import samples, small_run
from tests.support.small_run import flags, train

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a config, training and held-out shards, in which the commands run."""
    monkeypatch.chdir(tmp_path)
    return small_run.write_workspace(tmp_path)


def run_script(name, *words) -> None:
    subprocess.run([sys.executable, ROOT / name, *words], check=True, capture_output=True)


def test_tiny_run_loss_falls(workspace):
    train(max_steps=40, learning_rate=0.02, skip_checkpoint=True)
    found = samples.losses(workspace / "out/log.json")
    assert found[1] == pytest.approx(math.log(30522) + math.log(2), abs=0.3)
    assert found[40] < found[1] - 0.3


def test_log_has_the_lines_that_its_readers_expect(workspace):
    train(eval_dir="held_out", eval_freq=3, log_freq=2.0)
    lines = samples.log_lines(workspace / "out/log.json")
    for line in lines:
        assert line["type"] == "LOG" and {"timestamp", "datetime", "elapsedtime", "step", "data"} <= set(line)
        assert all(isinstance(line[key], str) for key in ("timestamp", "datetime", "elapsedtime"))
    assert lines[0]["step"] == "PARAMETER" and lines[0]["data"]["train_batch_size"] == 8
    steps = [line for line in lines if "step_loss" in line["data"]]
    assert [line["step"] for line in steps] == [[0, 2], [1, 4], [1, 6]]  # 25 rows an epoch, 8 a step
    for line in steps:
        assert {"average_loss", "step_loss", "learning_rate", "average_training_time_step",
                "average_perf_per_step"} <= set(line["data"])
        assert line["data"]["learning_rate"] == learning_rate(line["step"][1], 0.01, 0.3, 6)
        parts = line["data"]["mlm_loss"] + line["data"]["nsp_loss"]
        assert line["data"]["step_mean_loss"] == pytest.approx(parts, abs=1e-4)
    assert [line["step"][1] for line in lines if "eval_mlm_loss" in line["data"]] == [3, 6]
    assert lines[-1]["step"] == []
    assert {"e2e_train_time", "training_sequences_per_second", "final_loss", "raw_train_time"} <= set(lines[-1]["data"])


def test_log_shows_utilization_of_a_given_or_measured_peak(workspace):
    train(max_steps=1, skip_checkpoint=True, peak_tflops=1000.0)
    train(max_steps=1, skip_checkpoint=True, json_summary="measured.json")
    given, measured = (samples.log_lines(workspace / path)[1]["data"]["model_flops_utilization"]
                       for path in ("out/log.json", "measured.json"))
    assert 0 < given < 1e-3 and given < measured < 1


def test_average_loss_is_the_mean_of_the_steps_since_the_last_line(workspace):
    train(json_summary="every.json", skip_checkpoint=True)
    train(json_summary="third.json", log_freq=3, skip_checkpoint=True)
    each = samples.losses(workspace / "every.json")
    averages = [line["data"]["average_loss"] for line in samples.log_lines(workspace / "third.json")
                if "average_loss" in line["data"]]
    assert averages == pytest.approx([sum(each[step] for step in steps) / 3 for steps in ((1, 2, 3), (4, 5, 6))])


@pytest.mark.parametrize("rows, batch", [((1,), 8), ((3,), 8), ((5, 2), 4), ((9, 1, 4), 6)])
def test_data_sets_of_odd_sizes_train(workspace, rows, batch):
    samples.write_dataset(workspace / "odd", rows)
    train(input_dir="odd", train_batch_size=batch, max_steps=3)
    assert set(samples.losses(workspace / "out/log.json")) == {1, 2, 3}


def test_resumed_run_has_the_losses_of_one_that_never_stopped(workspace):
    train(output_dir="whole", json_summary="whole/log.json", max_steps=9)
    train(max_steps=9, steps_this_run=4)
    train(max_steps=9, resume_from_checkpoint=True)
    assert samples.losses(workspace / "out/log.json") == samples.losses(workspace / "whole/log.json")
    whole, resumed = (torch.load(workspace / folder / "ckpt_9.pt", weights_only=True) for folder in ("whole", "out"))
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_second_phase_continues_with_its_own_schedule(workspace):
    train()
    first = torch.load(workspace / "out/ckpt_6.pt", weights_only=True)
    samples.write_dataset(workspace / "longer", (9, 4), seed=9, sequence_length=32)
    second_phase = {"input_dir": "longer", "max_seq_length": 32, "phase2": True, "phase1_end_step": None,
                    "max_steps": 5, "learning_rate": 0.004, "warmup_proportion": 0.5, "train_batch_size": 4,
                    "num_steps_per_checkpoint": 2, "json_summary": "out/log2.json"}
    train(**second_phase, steps_this_run=3)
    assert sorted(path.name for path in (workspace / "out").glob("ckpt*")) == ["ckpt_4.pt", "ckpt_6.pt", "ckpt_8.pt",
                                                                             "ckpt_9.pt"]
    train(**second_phase)
    lines = [line for line in samples.log_lines(workspace / "out/log2.json") if "step_loss" in line["data"]]
    assert [line["step"][1] for line in lines] == [1, 2, 3, 4, 5]
    rates = [learning_rate(step, 0.004, 0.5, 5) for step in range(1, 6)]
    assert [line["data"]["learning_rate"] for line in lines] == rates
    last = torch.load(workspace / "out/ckpt_11.pt", weights_only=True)
    assert (last["phase"], last["step"], last["optimizer"]["param_groups"][0]["step"]) == (2, 5, 5)
    assert (workspace / "out/ckpt_6.pt").exists()
    moments = first["optimizer"]["state"][0]["exp_avg_sq"]
    assert moments.any() and moments.shape == last["optimizer"]["state"][0]["exp_avg_sq"].shape


def test_biases_can_have_a_rate_of_their_own(workspace):
    saved = []
    for factor in (1.0, 0.1):
        train(output_dir=f"out_{factor}", max_steps=3, steps_this_run=1, undecayed_rate=factor)
        saved.append(torch.load(f"out_{factor}/ckpt_1.pt", weights_only=True)["model"])
    whole, tenth = saved
    bias, weight = (f"bert.encoder.layer.0.intermediate.dense_act.{part}" for part in ("bias", "weight"))
    assert whole[bias].any()
    torch.testing.assert_close(tenth[bias], 0.1 * whole[bias])  # it starts at 0
    torch.testing.assert_close(tenth[weight], whole[weight])


def test_init_checkpoint_starts_from_its_weights(workspace):
    train()
    train(output_dir="again", json_summary="again.json", init_checkpoint="out/ckpt_6.pt", steps_this_run=1)
    first, again = samples.losses(workspace / "out/log.json"), samples.losses(workspace / "again.json")
    assert set(again) == {1} and again[1] < first[1]


def test_init_checkpoint_starts_phase_2_in_an_empty_folder_and_is_never_passed_over(workspace, capsys):
    train()
    phase2 = {"output_dir": "second", "json_summary": "second.json", "phase2": True, "resume_from_checkpoint": True,
              "max_steps": 5, "init_checkpoint": "out/ckpt_6.pt"}
    train(**phase2, steps_this_run=2)
    first = torch.load("second/ckpt_8.pt", weights_only=True)
    assert (first["phase"], first["step"], first["init_checkpoint"]) == (2, 2, "out/ckpt_6.pt")
    train(**phase2)  # the same command goes on
    assert list(samples.losses(workspace / "second.json")) == [1, 2, 3, 4, 5]
    assert torch.load("second/ckpt_11.pt", weights_only=True)["init_checkpoint"] == "out/ckpt_6.pt"
    for folder, began_with in (("second", "out/ckpt_6.pt"), ("out", "fresh weights")):
        with pytest.raises(UserError, match=f"--init_checkpoint other.pt: {folder}/ckpt_.*began with {began_with}"):
            train(**{**phase2, "init_checkpoint": "other.pt", "output_dir": folder})


def test_packed_rows_count_for_their_sequences(workspace, capsys):
    run_script("pack_pretraining_data_pytorch.py", "--input_dir=data", "--output_dir=packed",
               f"--max_sequence_length={samples.SEQUENCE_LENGTH}",
               f"--max_predictions_per_sequence={samples.PREDICTIONS}")
    average = json.loads((workspace / "packed_metadata.json").read_text())["avg_seq_per_sample"]
    train(input_dir="packed", train_batch_size=24, gradient_accumulation_steps=6, max_steps=2)
    accumulation = round(6 / average)
    assert accumulation < 6
    assert f"{accumulation} accumulation steps × 4 rows" in capsys.readouterr().out


def test_evaluation_command_gives_the_figures_of_the_log(workspace, capsys):
    train(eval_dir="held_out")
    logged = next(line["data"] for line in samples.log_lines(workspace / "out/log.json")
                  if "eval_mlm_loss" in line["data"])
    capsys.readouterr()
    evaluate.main(["--checkpoint", "out/ckpt_6.pt", "--config_file", "config.json", "--eval_dir", "held_out", "--json",
                   "--batch_size", "5", "--no_cuda"])
    figures = json.loads(capsys.readouterr().out)
    assert figures == pytest.approx({name.removeprefix("eval_"): value for name, value in logged.items()}, rel=1e-5)
    stored = read_rows(find_shards("held_out", "test")[0])
    assert figures["sequences"] == 6 and figures["masked_tokens"] == (stored["masked_lm_positions"] > 0).sum()


def test_lazy_device_has_the_losses_of_the_cpu(workspace):
    """In processes of their own: the lazy backend starts once a process."""
    found = []
    for device in ("no_cuda", "use_torch_lazy"):
        folder = f"out_{device}"
        changes = {"no_cuda": None, "output_dir": folder, "json_summary": f"{folder}.json", device: True,
                   "use_cpu_kernels": "no"}  # they have a dropout of their own
        run_script("run_pretraining.py", *flags(**changes))
        found.append(samples.losses(workspace / f"{folder}.json"))
    assert found[1] == pytest.approx(found[0], abs=1e-5)


def test_fused_lamb_has_the_losses_of_lamb(workspace, capsys):
    train(skip_checkpoint=True)
    train(skip_checkpoint=True, use_fused_lamb=True, json_summary="fused.json")
    assert "optimizer: NVLAMB in one kernel compiled for this CPU over" in capsys.readouterr().out
    assert samples.losses(workspace / "fused.json") == pytest.approx(samples.losses(workspace / "out/log.json"),
                                                                     rel=1e-5)


def test_without_a_compiler_a_run_says_so_and_continues(workspace, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    cpu_kernels.load.cache_clear()
    train(skip_checkpoint=True, use_fused_lamb=True, max_steps=2)
    cpu_kernels.load.cache_clear()
    printed = capsys.readouterr().out
    assert printed.count("no C++ compiler no-such-compiler") == 2
    assert set(samples.losses(workspace / "out/log.json")) == {1, 2}


@pytest.mark.slow
@pytest.mark.skipif(" " in torch.__file__, reason="inductor's linker commands do not quote the folder of PyTorch")
def test_compiled_run_has_the_losses_of_a_plain_one_and_compiles_nothing_after_the_warm_up(workspace, capsys):
    samples.write_config(workspace / "config.json", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                         num_hidden_layers=3)
    train(skip_checkpoint=True, use_cpu_kernels="no", max_steps=20)
    train(skip_checkpoint=True, use_torch_compile=True, max_steps=20, json_summary="compiled.json")
    torch._dynamo.reset()
    printed = capsys.readouterr().out
    assert "the model is compiled by inductor" in printed and "optimizer: NVLAMB, compiled by inductor" in printed
    assert samples.losses(workspace / "compiled.json") == pytest.approx(samples.losses(workspace / "out/log.json"),
                                                                        rel=1e-5)
    counts = [line["data"]["graph_compilation"] for line in samples.log_lines(workspace / "compiled.json")
              if "step_loss" in line["data"]]
    assert counts[2:] == counts[2:3] * 18 and counts[2] >= 6  # four parts of the model, two groups of weights


def test_bf16_run_is_near_fp32(workspace):
    train(skip_checkpoint=True)
    train(skip_checkpoint=True, hmp=True, json_summary="bf16.json")
    plain, bf16 = samples.losses(workspace / "out/log.json"), samples.losses(workspace / "bf16.json")
    assert bf16 != plain
    assert bf16 == pytest.approx(plain, rel=0.01)


def damaged_dataset(folder, change) -> None:
    path = samples.write_dataset(folder, (4,)) / "sample_training_0.hdf5"
    with h5py.File(path, "a") as file:
        change(file)


def without_labels(file) -> None:
    del file["next_sentence_labels"]


def with_large_token(file) -> None:
    file["input_ids"][2, 3] = 40_000


def refused(workspace, capsys, **changes) -> str:
    """The one line that a run with these flags ends with, after checking that it wrote nothing."""
    before = sorted(path for path in workspace.rglob("*"))
    try:
        train(**changes)
    except UserError as error:
        line = str(error)
    except SystemExit as stop:
        assert stop.code == 2
        line = capsys.readouterr().err
    else:
        pytest.fail("the run was not refused")
    assert len(line.strip().splitlines()) == 1
    assert sorted(path for path in workspace.rglob("*")) == before
    return line


@pytest.mark.parametrize("changes, said", [
    ({"input_dir": "nowhere"}, "--input_dir nowhere: no such folder"),
    ({"input_dir": "empty"}, "--input_dir empty: no shard in it"),
    ({"input_dir": "no_hdf5"}, "x_training.hdf5: not a readable HDF5 file"),
    ({"input_dir": "no_labels"}, "sample_training_0.hdf5: no data set next_sentence_labels"),
    ({"input_dir": "large_token"}, "input_ids of row 2 holds 40000, not from 0 to 30521"),
    ({"max_seq_length": 128}, "rows have 24 tokens, but --max_seq_length is 128"),
    ({"max_predictions_per_seq": 3}, "made with 4 predictions a sequence, but --max_predictions_per_seq is 3"),
    ({"config_file": "nowhere.json"}, "--config_file nowhere.json: No such file"),
    ({"config_file": "bad.json"}, "hidden_size 25 is not divisible by num_attention_heads 3"),
    ({"config_file": "short.json"}, "--max_seq_length 24 is above max_position_embeddings 23"),
    ({"gradient_accumulation_steps": 3}, "--train_batch_size 8 is not divisible by --gradient_accumulation_steps 3"),
    ({"use_habana": True}, "--use_habana: no HPU can be used"),
    ({"enable_packed_data_mode": True}, "--enable_packed_data_mode True, but the shards in data are not packed"),
    ({"enable_packed_data_mode": "yes"}, "--enable_packed_data_mode True, but the shards in data are not packed"),
    ({"fp16": True, "hmp": True}, "--fp16 and --hmp exclude each other"),
    ({"fp16": True}, "--fp16 needs CUDA, but the device is cpu"),
    ({"phase2": True}, "no checkpoint in it; --phase2 continues from ckpt_6.pt"),
    ({"phase2": True, "resume_from_checkpoint": True}, "no checkpoint in it; --phase2 continues from ckpt_6.pt"),
    ({"do_train": None}, "give --do_train or --dry_run"),
    ({"train_batch_sise": 8}, "unrecognized arguments: --train_batch_sise=8: did you mean --train_batch_size?"),
    ({"log_freq": 1.5}, "'1.5' is not a whole number of at least 1"),
    ({"train_batch_size": "eight"}, "'eight' is not a whole number"),
    ({"use_zero_optimizer": "perhaps"}, "'perhaps' is neither true nor false"),
    ({"steps_this_run": 7}, "--steps_this_run 7 is neither -1 nor from 1 to --max_steps 6"),
    ({"peak_tflops": -1}, "--peak_tflops -1.0 is not a number of at least 0"),
    ({"warmup_proportion": 1.5}, "'1.5' is not a number from 0 to 1"),
    ({"eval_dir": "data"}, "--eval_dir data: no shard in it"),
    ({"init_checkpoint": "config.json"}, "config.json: not a readable checkpoint"),
])
def test_bad_input_is_refused_in_one_line_and_nothing_written(workspace, capsys, changes, said):
    (workspace / "empty").mkdir()
    (workspace / "no_hdf5").mkdir()
    (workspace / "no_hdf5/x_training.hdf5").write_text("text")
    damaged_dataset(workspace / "no_labels", without_labels)
    damaged_dataset(workspace / "large_token", with_large_token)
    samples.write_config(workspace / "bad.json", hidden_size=25)
    samples.write_config(workspace / "short.json", max_position_embeddings=23)
    line = refused(workspace, capsys, **changes)
    assert said in line


def test_checkpoints_in_the_output_folder_are_not_touched(workspace, capsys):
    train()
    contents = {path: path.read_bytes() for path in (workspace / "out").iterdir()}
    assert "holds ckpt_6.pt already" in refused(workspace, capsys)
    assert {path: path.read_bytes() for path in (workspace / "out").iterdir()} == contents


def test_a_process_ends_with_one_line_and_exit_code_two(workspace):
    done = subprocess.run([sys.executable, ROOT / "run_pretraining.py", *flags(input_dir="nowhere")],
                          capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1 and "nowhere" in done.stderr


def test_both_spellings_of_a_flag_are_one(workspace):
    dashed = [word.split("=")[0].replace("_", "-") + "=" + word.split("=")[1] if "=" in word else word.replace("_", "-")
              for word in flags(max_steps=1)]
    run_pretraining.main(["--" + word[2:] for word in dashed])
    assert set(samples.losses(workspace / "out/log.json")) == {1}


def test_epochs_give_the_steps_where_no_number_of_steps_is_given(workspace, capsys):
    train(max_steps=None, num_train_epochs=1.5, skip_checkpoint=True)  # 25 rows, 8 a step
    steps = samples.losses(workspace / "out/log.json")
    assert max(steps) == 5  # 1.5 · 25 / 8 = 4.7
    with pytest.raises(UserError, match=r"--steps_this_run 6 is neither -1 nor from 1 to --max_steps 5 .*epochs 1.5"):
        train(max_steps=None, num_train_epochs=1.5, steps_this_run=6, skip_checkpoint=True)
    train(max_steps=2, num_train_epochs=1.5, skip_checkpoint=True, json_summary="both.json")
    assert max(samples.losses(workspace / "both.json")) == 2
    assert "--num_train_epochs 1.5 has no effect beside --max_steps" in capsys.readouterr().err


def test_adamw_trains_and_goes_on_only_as_adamw(workspace):
    changes = {"optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 0.002, "lr_schedule": "cosine"}
    train(**changes, max_steps=20)
    found = samples.losses(workspace / "out/log.json")
    assert found[20] < found[1] - 0.3
    parameters = samples.log_lines(workspace / "out/log.json")[0]["data"]
    assert parameters["descriptions"]["optimizer"].startswith("optimizer: AdamW in PyTorch's fused kernel")
    assert "with weight decay 0.1" in parameters["descriptions"]["optimizer"]
    with pytest.raises(UserError, match=r"ckpt_20.pt: written with --optimizer 'adamw', this run has --optimizer lamb"):
        train(max_steps=30, resume_from_checkpoint=True)
    train(phase2=True, phase1_end_step=20, max_steps=1)  # a new phase may take another optimizer
