"""Fixtures that several test files share."""

import os
from pathlib import Path

import pytest

from tests.support.preparation import STAGES, prepare


def pytest_addoption(parser):
    parser.addoption("--every_command", action="store_true", help="all commands for 8 cards, in minutes")


@pytest.fixture(scope="session", autouse=True)
def folder_of_mpirun(tmp_path_factory):
    """mpirun keeps files in a folder named by its process id; one that was killed leaves it, and where a later one gets
    the same id, it cannot start ("The PMIx server's listener thread failed to start").
    """
    os.environ["PRTE_MCA_prte_tmpdir_base"] = str(tmp_path_factory.mktemp("mpirun"))  # noqa: SIM112 (its spelling)


@pytest.fixture(scope="session")
def sample(tmp_path_factory) -> Path:
    """A working folder in which the sample went through all stages, on one process."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder, "download")
    for action, *flags in STAGES:
        prepare(folder, action, *flags, "--n_processes", 1)
    return folder
