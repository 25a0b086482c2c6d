"""A finished run for the tests that read, damage or replace its checkpoints."""

import shutil

import pytest

from tests.support import small_run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which a run of 6 steps has left ckpt_4.pt and ckpt_6.pt of a model with a small vocabulary."""
    folder = small_run.write_workspace(tmp_path_factory.mktemp("trained"))
    small_run.train(config_file=folder / "config.json", input_dir=folder / "data", output_dir=folder / "out",
                    json_summary=folder / "out/log.json")
    return folder


@pytest.fixture
def trained_copy(trained, tmp_path, monkeypatch):
    """A copy of it, in which the commands run."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
