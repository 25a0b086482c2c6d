"""Where files are kept that can be made or downloaded again."""

from pathlib import Path

from common.files import cache_folder


def test_the_cache_folder_is_the_named_one_else_the_users(monkeypatch):
    for name in ("BERT_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/user")
    assert cache_folder() == Path("/home/user/.cache/bert_pretraining")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cache_folder() == Path("/caches/bert_pretraining")
    monkeypatch.setenv("BERT_CACHE_DIR", "/large/bert")
    assert cache_folder() == Path("/large/bert")
