"""The process that reads shards: what its parent says of calls that take long, or end it."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from common import cli
from common.errors import UserError
from data.shard_reader import ShardReader


def test_a_file_that_does_not_come_is_told_of_while_it_is_waited_for(tmp_path, monkeypatch, capfd):
    """A pipe without a writer stands for a file server that does not answer."""
    pipe = tmp_path / "rows.hdf5"
    os.mkfifo(pipe)

    def write_later():
        time.sleep(1.0)  # notices come after 0.2, 0.6 and 1.4 s
        pipe.write_bytes(b"rows")

    writer = threading.Thread(target=write_later)
    with ShardReader() as reader:
        assert reader.call(os.path.basename, pipe) == pipe.name  # at once, and nothing is said
        assert capfd.readouterr().err == ""
        monkeypatch.setattr(cli, "FIRST_NOTICE", 0.2)
        writer.start()
        assert reader.call(Path.read_bytes, pipe) == b"rows"
    writer.join()
    said = capfd.readouterr().err.splitlines()
    assert said == [f"warning: waiting for {pipe}: not read after {seconds} s" for seconds in (0, 1)]


@pytest.mark.parametrize("call, reason", [
    ((signal.raise_signal, signal.SIGSEGV), "reading it ended the process with SIGSEGV"),
    ((sum, range(10**12)), "reading it took more than 1 seconds of processor time"),
])
def test_a_call_that_ends_the_process_twice_is_an_error_and_the_next_one_gets_a_new_process(call, reason):
    with ShardReader(longest_call=1.0) as reader:
        with pytest.raises(UserError, match=reason):
            reader.call(*call)
        assert reader.call(abs, -3) == 3
