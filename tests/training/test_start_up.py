"""What a start of the training command loads: nothing heavy that it does not use."""

import os
import subprocess
import sys

from tests.support import small_run
from tests.test_house import ROOT

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "torch.utils.tensorboard", "tensorboard", "transformers", "scipy",
         "matplotlib", "pandas", "pyarrow", "boto3", "nltk")
PROGRAM = f"""
import sys
import run_pretraining

def loaded(names):
    return sorted(set(names) & set(sys.modules))

try:
    run_pretraining.main(["--help"])
except SystemExit:
    print("loaded by --help:", loaded(["torch", "h5py", "tokenizers", *{HEAVY}]))
run_pretraining.main([*sys.argv[1:], "--steps_this_run=1"])
print("loaded by a training:", loaded({HEAVY}), loaded(["torch"]))
run_pretraining.main([*sys.argv[1:], "--resume_from_checkpoint"])
print("loaded by the next:", loaded({HEAVY}))
"""


def test_neither_help_nor_a_training_that_evaluates_saves_and_resumes_loads_what_it_does_not_use(tmp_path):
    small_run.write_workspace(tmp_path)
    flags = small_run.flags(max_steps=2, num_steps_per_checkpoint=1, eval_dir="held_out", eval_freq=1)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *flags], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("loaded by")] == [
        "loaded by --help: []", "loaded by a training: [] ['torch']", "loaded by the next: []"]
