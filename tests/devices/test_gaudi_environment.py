"""What is set for Gaudi's software before torch is imported, and which contradictions are refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from devices.gaudi_environment import BF16_LIST, FP32_LIST, LAZY_MODE, lazy_mode, list_variables, prepared
from devices.options import DeviceOptions, PrecisionOptions
from tests.support import gaudi
from training.arguments import device_options, parse_arguments, precision_options

ROOT = Path(__file__).resolve().parent.parent.parent
LISTS = ["--hmp", "--hmp_bf16=ops_bf16_bert_pt.txt", "--hmp_fp32=ops_fp32_bert_pt.txt"]


def arguments(*flags):
    return parse_arguments(["--do_train", "--input_dir=D", "--config_file=C", "--output_dir=O", "--use_habana", *flags])


def device(*flags) -> DeviceOptions:
    args = arguments(*flags)
    return device_options(args, args.use_torch_compile)


def precision(*flags) -> PrecisionOptions:
    return precision_options(arguments(*flags))


@pytest.mark.parametrize("flags, environ, lazy", [
    ([], {}, True),
    (["--use_lazy_mode=true"], {}, True),
    (["--use_lazy_mode=False"], {}, False),
    (["--use_torch_compile"], {}, False),
    ([], {LAZY_MODE: "0"}, False),  # the environment wins over a default
    ([], {LAZY_MODE: "1"}, True),
    (["--use_lazy_mode=no"], {LAZY_MODE: "0"}, False),
    (["--use_torch_compile"], {LAZY_MODE: "0"}, False),
])
def test_mode_comes_from_the_typed_flag_then_the_environment_then_the_default(flags, environ, lazy):
    assert lazy_mode(device(*flags), environ) is lazy


@pytest.mark.parametrize("flags, value, named", [
    (["--use_lazy_mode=True"], "0", "--use_lazy_mode True"),
    (["--use_lazy_mode=0"], "1", "--use_lazy_mode False"),
    (["--use_torch_compile"], "1", "--use_torch_compile"),
    ([], "2", "neither 0"),
    ([], "lazy", "neither 0"),
])
def test_an_environment_that_contradicts_a_typed_flag_is_refused(flags, value, named):
    with pytest.raises(UserError, match=LAZY_MODE) as caught:
        lazy_mode(device(*flags), {LAZY_MODE: value})
    assert named in str(caught.value) and value in str(caught.value)


def test_lists_are_translated_into_the_names_of_gaudis_autocast(tmp_path):
    variables = list_variables(precision(*LISTS), {}, tmp_path)
    bf16, fp32 = (Path(variables[name]).read_text().splitlines() for name in (BF16_LIST, FP32_LIST))
    assert bf16 == ["add", "addmm", "bmm", "dropout", "gelu", "layer_norm", "linear", "matmul", "mm", "rsub", "softmax"]
    assert {"cross_entropy_loss", "nll_loss_nd", "div", "true_divide", "embedding", "log_softmax"} <= set(fp32)
    assert not {"cross_entropy", "truediv"} & set(fp32), "names that match nothing"


@pytest.mark.parametrize("flags, names", [
    ([], set()), (["--hmp"], set()), (LISTS[:2], {BF16_LIST}), (["--hmp", LISTS[2]], {FP32_LIST}),
    ([*LISTS, "--hmp_opt_level=O2"], set()), (LISTS[1:], set())])
def test_a_list_is_set_only_where_its_flag_counts(tmp_path, flags, names):
    assert set(list_variables(precision(*flags), {}, tmp_path)) == names


def test_a_list_in_the_environment_stays_unless_it_contradicts_a_typed_one(tmp_path):
    (tmp_path / "mine").write_text("linear\nmatmul\n")
    (tmp_path / "same").write_text("softmax\nadd\naddmm\nbmm\ndropout\ngelu\nlayer_norm\nlinear\nmatmul\nmm\nrsub\n")
    assert list_variables(precision("--hmp"), {BF16_LIST: str(tmp_path / "mine")}, tmp_path) == {}
    same = list_variables(precision(*LISTS), {BF16_LIST: str(tmp_path / "same")}, tmp_path)
    assert set(same) == {FP32_LIST}
    with pytest.raises(UserError, match="contradicts --hmp_bf16 ops_bf16_bert_pt.txt") as caught:
        list_variables(precision(*LISTS), {BF16_LIST: str(tmp_path / "mine")}, tmp_path)
    assert "softmax" in str(caught.value) and "matmul" not in str(caught.value)


WITHIN_THE_BLOCK = """
import os
from pathlib import Path
from devices.gaudi_environment import prepared
from devices.options import DeviceOptions, PrecisionOptions
lists = PrecisionOptions(bf16=True, bf16_list="ops_bf16_bert_pt.txt", fp32_list="ops_fp32_bert_pt.txt")
with prepared(DeviceOptions(use_habana=True), lists, local_rank=3):
    file = Path(os.environ["PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST"])
    assert os.environ["PT_HPU_LAZY_MODE"] == "1" and "linear" in file.read_text().split()
    assert os.environ["HLS_MODULE_ID"] == "3"
assert os.environ["PT_HPU_LAZY_MODE"] == "1" and not file.exists()
assert "PT_HPU_AUTOCAST_LOWER_PRECISION_OPS_LIST" not in os.environ
"""


def test_variables_and_files_are_there_within_the_block_alone():
    done = gaudi.run(["-c", WITHIN_THE_BLOCK], PT_HPU_LAZY_MODE="1")
    assert done.returncode == 0, done.stderr


def test_nothing_is_set_without_use_habana(monkeypatch):
    monkeypatch.delenv(LAZY_MODE, raising=False)
    with prepared(DeviceOptions(), precision(*LISTS)):
        assert LAZY_MODE not in os.environ and BF16_LIST not in os.environ


def test_what_comes_before_torch_does_not_import_it():
    program = ("import sys, training.arguments, devices.gaudi_environment, devices.op_lists, devices.options; "
               "import run_pretraining, evaluate; "
               "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("flags, message", [
    (["--use_lazy_mode=True", "--use_torch_compile"], "--use_lazy_mode True and --use_torch_compile exclude"),
    (["--hmp", "--fp16"], "--fp16 and --hmp exclude each other"),
    (["--use_torch_lazy"], "--use_torch_lazy excludes"),
    (["--profile", "--profile_steps=3:2"], "'3:2' is not A or A:B"),
    (["--profile", "--profile_steps=4:"], "'4:' is not A or A:B"),
    (["--profile", "--max_steps=5"], "--profile_steps 4:6, but the run ends at step 5"),
])
def test_flags_that_exclude_each_other_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        arguments(*flags)
    printed = capsys.readouterr().err
    assert caught.value.code == 2 and message in printed and len(printed.splitlines()) == 1
