"""The hostile pickles of tools/fuzz.py: harmful where a pickle is executed, without effect where it is only read."""

import pickle
from pathlib import Path

import pytest

from checkpoint.archive import load_archive
from tools.malformed_pickles import CALLS, MARKER, WAYS, by_stack, called, named, plain, saved_before_1_6

VALUE = b"\x80\x02X\x05\x00\x00\x00valueq\x00."


@pytest.mark.parametrize("naming", [named, by_stack])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call[0]}.{call[1]}")
def test_each_call_leaves_a_mark_where_it_is_executed_and_none_where_it_is_read(tmp_path, monkeypatch, call, naming):
    monkeypatch.chdir(tmp_path)
    module, name, arguments = call
    pickle.loads(b"\x80\x04" + called(naming(module, name), plain(arguments)) + b".")
    assert Path(MARKER).exists(), "else this shows nothing"
    Path(MARKER).rmdir() if Path(MARKER).is_dir() else Path(MARKER).unlink()
    sound = saved_before_1_6("value")
    for way in set(WAYS) - {"SETITEM"}:  # which makes a dictionary
        hostile = called(naming(module, name), plain(arguments), way)
        Path("file.pt").write_bytes(sound.replace(VALUE, b"\x80\x02]" + hostile + b"a."))
        (found,) = load_archive("file.pt")
        assert repr(found) == f"{module}.{name}"
    assert not Path(MARKER).exists()
