"""The flags of the reference scripts, of software 1.6.1 and of 1.23, one by one: accepted, and with what meaning."""

import json

import pytest

import export_to_huggingface
import fill_mask
import pack_pretraining_data_pytorch
import run_pretraining
from common.cli import ArgumentParser
from data.preparation.samples import add_sample_flags
from tests.support import small_run
from training.arguments import build_parser, command_flags, parse_arguments

REQUIRED = ["--do_train", "--input_dir=data", "--config_file=c.json", "--output_dir=out"]
NAMES = """input_dir config_file bert_model output_dir init_checkpoint max_seq_length max_predictions_per_seq
    train_batch_size learning_rate num_train_epochs max_steps warmup_proportion local_rank seed
    gradient_accumulation_steps fp16 amp loss_scale log_freq checkpoint_activations resume_from_checkpoint resume_step
    num_steps_per_checkpoint skip_checkpoint phase2 allreduce_post_accumulation allreduce_post_accumulation_fp16
    phase1_end_step init_loss_scale do_train json-summary use_env disable_progress_bar steps_this_run no_cuda use_habana
    use_fused_lamb use_lazy_mode enable_packed_data_mode use_zero_optimizer"""
ONLY_1_6 = "hmp hmp_bf16 hmp_fp32 hmp_opt_level hmp_verbose"
ONLY_1_23 = """autocast profile profile_steps tensorboard_logdir use-hpu-graphs use_torch_compile no_compiled_autograd
    log_memory_usage enable-tensorboard-logging"""


def values(*words: str) -> dict:
    return vars(parse_arguments([*REQUIRED, *words]))


@pytest.mark.parametrize("name", f"{NAMES} {ONLY_1_6} {ONLY_1_23}".split())
def test_every_flag_of_the_reference_scripts_is_known(name):
    assert f"--{name.replace('-', '_')}" in build_parser()._option_string_actions


@pytest.mark.parametrize("words, expected", [
    ("--max_steps 7038.0", {"max_steps": 7038}), ("--max-steps=1e4", {"max_steps": 10_000}),
    ("--log_freq 1.0", {"log_freq": 1}), ("--train_batch_size=64.0", {"train_batch_size": 64}),
    ("--local-rank=0", {"local_rank": 0}), ("--local_rank -1", {"local_rank": -1}),
    ("--seed 7.0 --phase1-end-step 7038.0", {"seed": 7, "phase1_end_step": 7038}),
    ("--json-summary=a.json", {"json_summary": "a.json"}), ("--json_summary=a.json", {"json_summary": "a.json"}),
    ("--use_lazy_mode", {"use_lazy_mode": True}), ("--use-lazy-mode false", {"use_lazy_mode": False}),
    ("--enable_packed_data_mode False", {"enable_packed_data_mode": False}),
    ("--enable_packed_data_mode", {"enable_packed_data_mode": True}),
    ("--use_zero_optimizer", {"use_zero_optimizer": True}), ("--use_zero_optimizer=0", {"use_zero_optimizer": False}),
    ("--autocast", {"hmp": True}), ("--use_autocast True", {"hmp": True}), ("--use-autocast=False", {"hmp": False}),
    ("--hmp --hmp_opt_level O1", {"hmp": True}), ("--amp", {"fp16": True}), ("--fp16", {"fp16": True}),
    ("--init_loss_scale 1048576", {"init_loss_scale": 2.0**20}), ("--loss_scale 0.0", {"loss_scale": 0.0}),
    ("--use_habana --use-hpu-graphs True", {"use_hpu_graphs": True}),
    ("--use_hpu_graphs False", {"use_hpu_graphs": False}),
    ("--use_habana --use_hpu_graphs", {"use_hpu_graphs": True}),
    ("--no_compiled_autograd", {"no_compiled_autograd": True, "use_torch_compile": False}),
    ("--log_memory_usage True", {}), ("--log-memory-usage", {}), ("--use_env", {}), ("--num_train_epochs=3.0", {}),
    ("--profile True --profile_steps 3:5", {"profile": True, "profile_steps": (3, 5)}),
    ("--profile --profile_steps 0", {"profile": True, "profile_steps": (1, 1)}),
    ("--profile False --profile_steps 0:0", {"profile": False, "profile_steps": (1, 1)}),
    ("--profile_steps 0:2", {"profile_steps": (1, 2)}), ("--profile_steps 50,55", {"profile_steps": (50, 55)}),
    ("--steps_this_run 5", {"steps_this_run": 5}), ("--steps_this_run -1", {"steps_this_run": -1}),
    ("--skip_checkpoint --disable-progress-bar", {"skip_checkpoint": True, "disable_progress_bar": True}),
    ("--allreduce_post_accumulation_fp16", {"allreduce_post_accumulation": True,
                                            "allreduce_post_accumulation_fp16": True}),
    ("--phase2", {"resume_from_checkpoint": True, "phase1_end_step": None}),
    ("--phase2 --init_checkpoint=w.pt", {"resume_from_checkpoint": False}),
    ("--enable-tensorboard-logging", {"tensorboard_logdir": "out/worker_0"}),
    ("--enable_tensorboard_logging True --tensorboard_logdir t", {"tensorboard_logdir": "t"}),
    ("--tensorboard-logdir=t", {"tensorboard_logdir": "t", "enable_tensorboard_logging": False}),
])
def test_flags_are_taken_as_the_reference_scripts_take_them(words, expected):
    found = values(*words.split())
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("words, said", [
    ("--max_steps 7038.5", "'7038.5' is not a whole number"), ("--log_freq 0.5", "'0.5' is not a whole number"),
    ("--resume_step 1.5", "'1.5' is not a whole number"), ("--profile maybe", "'maybe' is neither true nor false"),
    ("--profile_steps 5,3", "'5,3' is not A or A:B"), ("--json-sumary=a", "did you mean --json_summary?"),
    ("--max_pred=20", "did you mean --max_predictions_per_seq?"),
    ("--use_hpu_graph True", "did you mean --use_hpu_graphs?")])
def test_what_cannot_be_meant_is_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        values(*words.split())
    line = capsys.readouterr().err
    assert caught.value.code == 2 and said in line and len(line.splitlines()) == 1


SAMPLES = ArgumentParser()
SAMPLES.add_argument("--input_file")
add_sample_flags(SAMPLES)
FILES = ["--checkpoint=c.pt", "--config_file=c.json", "--vocab_file=v.txt"]


@pytest.mark.parametrize("parse, default", [
    (lambda *words: SAMPLES.parse_args(words), True),  # of create_pretraining_data.py and data/bertPrep.py
    (lambda *words: fill_mask.parse_arguments([*FILES, *words]), None),  # as the checkpoint says
    (lambda *words: export_to_huggingface.parse_arguments([*FILES, "--output_dir=o", *words]), None)])
def test_do_lower_case_stands_bare_or_with_a_value(parse, default):
    for words, expected in (((), default), (("--do_lower_case",), True), (("--do_lower_case", "1"), True),
                            (("--do-lower-case", "0"), False), (("--do_lower_case=False",), False)):
        assert parse(*words).do_lower_case is expected, words


def test_the_packer_takes_the_flags_without_a_meaning():
    options = pack_pretraining_data_pytorch.parse_options(
        ["--input_dir=a", "--output-dir=b", "--max_sequence_length=128.0", "--max_predictions_per_sequence=20",
         "--train_batch_size=8", "--local_rank=-1"])
    assert (options.max_sequence_length, options.output_dir) == (128, "b")


def test_tensorboard_figures_and_traces_lie_where_the_reference_script_puts_them(tmp_path, monkeypatch):
    monkeypatch.chdir(small_run.write_workspace(tmp_path))
    words = small_run.flags(max_steps=2, skip_checkpoint=True)
    run_pretraining.main([*words, "--enable-tensorboard-logging", "--profile", "True", "--profile_steps", "2"])
    names = [path.name for path in (tmp_path / "out/worker_0").iterdir()]
    assert sorted(name.split(".")[0] for name in names) == ["events", "trace_rank0_steps2-2"]
    assert "trace_rank0_steps2-2.pt.trace.json" in names


def test_a_folder_replaces_what_was_named_before_and_parts_of_a_mixture_add_up():
    assert values("--input_dir", "other")["input_dir"] == "other"
    assert values("--input_dir", "a=x:1", "--input_dir", "b=y:2")["input_dir"] == ["a=x:1", "b=y:2"]
    assert values("--input_dir", "a=x:1", "b=y:2")["input_dir"] == ["a=x:1", "b=y:2"]
    assert values("--input_dir", "a=x:1", "b=y:2", "--input_dir=z")["input_dir"] == "z"
    flags = command_flags(json.loads(json.dumps(values("--input_dir", "a=x:1", "b=y:2"))))
    assert values(*flags)["input_dir"] == ["a=x:1", "b=y:2"]
    with pytest.raises(SystemExit):
        values("--input_dir", "x", "y")
