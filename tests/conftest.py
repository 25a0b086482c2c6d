"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from tests.support.preparation import STAGES, prepare


def pytest_addoption(parser):
    parser.addoption("--every_command", action="store_true", help="all commands for 8 cards, in minutes")


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A working folder in which the sample went through all stages, on one process."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, "download")
    for action, *flags in STAGES:
        prepare(folder, action, *flags, "--n_processes", 1)
    return folder
