"""Where files are kept that can be made or downloaded again."""

import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from common.files import cache_folder

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_cache_folder_is_the_named_one_else_the_users(monkeypatch):
    for name in ("BERT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/.cache/bert_pretraining")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/bert_pretraining")
    monkeypatch.setenv("BERT_CACHE_DIR", "/large/bert")
    assert cache_folder() == Path("/large/bert")


AS_A_USER_WITHOUT_A_NAME = """
import os, pwd, tempfile
from common.files import cache_folder
os.setuid(54321)
print(cache_folder())
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become a user without a name")
def test_a_user_without_a_name_and_a_home_gets_a_folder_of_its_own(request):
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))  # tmp_path lies below a folder that is root's alone
    request.addfinalizer(partial(shutil.rmtree, temporary))
    temporary.chmod(0o777)
    folder = temporary / "bert_pretraining_54321"

    def found(**variables) -> subprocess.CompletedProcess:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), **variables}
        return subprocess.run([sys.executable, "-c", AS_A_USER_WITHOUT_A_NAME], env=environment, text=True,
                              capture_output=True, cwd=ROOT)

    for _ in range(2):
        assert found().stdout.strip() == str(folder)
        assert folder.stat().st_mode & 0o777 == 0o700
    assert found(BERT_CACHE_DIR="/somewhere").stdout.strip() == "/somewhere"
    folder.chmod(0o777)
    assert "others can write to it; name another folder in BERT_CACHE_DIR" in found().stderr
