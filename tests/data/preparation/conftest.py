"""A working folder of its own for a test that calls the stages in its process."""

from pathlib import Path

import pytest


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The working folder, in the current one."""
    monkeypatch.setenv("BERT_PREP_WORKING_DIR", str(tmp_path / "work"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "work"
