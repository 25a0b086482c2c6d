"""One writer at a time, whoever it is, wherever it runs, and however it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from common import lock_owner, locks
from common.errors import UserError
from common.locks import LOCK_NAME, file_lock, folder_lock
from tests.support.held_folder import ROOT, held_folder, other_host


def owner_in(folder) -> dict:
    return json.loads((Path(folder) / LOCK_NAME).read_text().splitlines()[0])


def refusal(folder) -> str:
    """How this process is refused; "" where it gets the lock."""
    try:
        with folder_lock(folder, "--output_dir x"):
            assert owner_in(folder)["pid"] == os.getpid()
            return ""
    except UserError as error:
        return str(error)


# --- who is alive ---

def test_the_second_is_refused_by_the_firsts_host_process_and_start(tmp_path):
    before = datetime.now().astimezone().replace(microsecond=0)
    with held_folder(tmp_path / "a" / "out") as first:
        said = refusal(tmp_path / "a" / "out")
        started = owner_in(tmp_path / "a" / "out")["started"]
        assert f"--output_dir x: in use by -c, process {first.pid} on host {socket.gethostname()}, started " in said
        assert started in said and before <= datetime.fromisoformat(started) <= datetime.now().astimezone()
        assert first.end() == (0, "")
    assert list(tmp_path.iterdir()) == []  # the folders that the lock needed are gone with it
    assert refusal(tmp_path) == ""


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_does_not_hold(tmp_path, reaped):
    with held_folder(tmp_path) as first:
        os.kill(first.process.pid, signal.SIGKILL)
        if reaped:
            first.process.wait()
        else:  # its parent, this process, does not ask how it ended
            os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT)
        assert (tmp_path / LOCK_NAME).exists()
        assert refusal(tmp_path) == ""


def written_lock(folder, **changes) -> Path:
    """A lock of this process, but for the changes, that nobody renews."""
    path = Path(folder) / LOCK_NAME
    path.write_text(json.dumps({**vars(locks.this_process()), "token": "another", **changes}) + "\n")
    return path


def test_a_process_number_that_another_process_has_now_does_not_hold(tmp_path):
    written_lock(tmp_path)
    assert f"process {os.getpid()}" in refusal(tmp_path)
    written_lock(tmp_path, ticks=locks.this_process().ticks - 1)
    assert refusal(tmp_path) == ""


def test_a_process_on_another_host_is_alive_while_it_renews_its_lock(tmp_path):
    """Its number is that of no process, or of another one, here; where it is told from its number, it is dead."""
    with held_folder(tmp_path, prefix=other_host()) as first:
        assert first.pid < 100
        assert f"process {first.pid} on host other, started" in refusal(tmp_path)
    written_lock(tmp_path, pid=2**22 + 1)
    assert refusal(tmp_path) == ""


@pytest.mark.parametrize("clock", [0.0, 1e9, 4e9])
def test_another_hosts_clock_plays_no_part(tmp_path, monkeypatch, capfd, clock):
    monkeypatch.setattr(lock_owner, "STALE_SECONDS", 1.0)
    path, ended = written_lock(tmp_path, namespace="another", host="other"), threading.Event()

    def renew() -> None:
        for second in range(1000):
            os.utime(path, (clock + second, clock + second))
            if ended.wait(0.1):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    try:
        assert "on host other" in refusal(tmp_path)
    finally:
        ended.set()
        thread.join()
    assert refusal(tmp_path) == ""  # nobody renews it any more
    assert f"this run starts after 120 seconds, or when {path} is deleted" in capfd.readouterr().err


def test_a_lock_that_cannot_be_read_counts_as_anothers(tmp_path, monkeypatch):
    """One that was cut when its owner died, and one in a line that no owner writes."""
    monkeypatch.setattr(lock_owner, "STALE_SECONDS", 0.5)
    for text in ("", '{"pid": 12', '{"pid": "x"}'):
        (tmp_path / LOCK_NAME).write_text(text)
        began = time.monotonic()
        assert refusal(tmp_path) == ""
        assert time.monotonic() - began > 0.5
    (tmp_path / LOCK_NAME).symlink_to("nowhere")
    monkeypatch.setattr(locks, "REMOVAL_SECONDS", 0.5)
    assert refusal(tmp_path).endswith(f"{tmp_path / LOCK_NAME} can be neither made nor read: delete it")


def test_a_dead_lock_that_has_changed_hands_is_left_to_its_new_owner(tmp_path):
    """Two processes have seen it dead; the slower one acts when the other has its own lock there."""
    path = written_lock(tmp_path, ticks=1)
    seen_by_the_slower = lock_owner.sighting(path)
    with folder_lock(tmp_path, "--output_dir x"):
        locks.LockFile(path, "x").remove(seen_by_the_slower)
        assert "in use" in refusal(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_while_it_removes_a_lock_holds_up_nobody_for_long(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "REMOVAL_SECONDS", 0.5)
    written_lock(tmp_path, ticks=1)
    (tmp_path / f"{LOCK_NAME}.removal").touch()
    assert refusal(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


# --- how it ends ---

@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_the_lock(tmp_path, number):
    with held_folder(tmp_path) as first:
        os.kill(first.process.pid, number)
        assert first.process.wait(timeout=60) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_forked_child_neither_keeps_nor_removes_the_lock(tmp_path):
    """The child leaves the block by an exception, as multiprocessing's do not, and then lives on."""
    child = "pid = os.fork() or sys.exit(); os.waitpid(pid, 0); print('child ended', flush=True)"
    with held_folder(tmp_path, child) as first:
        first.do()
        assert first.process.stdout.readline() == "child ended\n"
        assert f"process {first.pid} " in refusal(tmp_path)
    with held_folder(tmp_path, "os.fork() or __import__('time').sleep(600)") as first:
        first.do()
        first.process.kill()
        first.process.wait()
        assert refusal(tmp_path) == ""


def test_who_comes_while_the_first_is_ending_waits_for_it(tmp_path):
    second = [sys.executable, "-c", "import sys; from common import cli, locks\n"
              "with locks.folder_lock(sys.argv[1], '--output_dir x'): print('its turn')", tmp_path]
    with held_folder(tmp_path, "locks.announce_end(); print('ending', flush=True)") as first:
        first.do()
        assert first.process.stdout.readline() == "ending\n"
        waiting = subprocess.Popen(second, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert f"process {first.pid} on host" in (line := waiting.stderr.readline())
        assert line.endswith("it was told to end: waiting up to 600 seconds\n")
        assert waiting.poll() is None
        assert first.end()[0] == 0
        assert waiting.communicate(timeout=60) == ("its turn\n", "")


def test_a_deleted_lock_is_made_again_and_a_lost_one_ends_its_former_owner(tmp_path):
    path = tmp_path / LOCK_NAME
    with held_folder(tmp_path) as first:
        text = path.read_text()
        path.unlink()
        while not path.exists() or not path.read_text():
            assert first.process.poll() is None
        assert path.read_text() == text
        successor = tmp_path / "new"
        successor.write_text(text.replace(json.loads(text)["token"], "another"))
        successor.replace(path)
        assert first.process.wait(timeout=60) == 2
        assert "taken over by -c, process" in first.process.stderr.read()
    assert "another" in path.read_text()


CONTENDER = """
import fcntl, os, random, sys, time
from common import lock_owner, locks
locks.POLL_SECONDS = 0.005
random.seed(sys.argv[2])
for _ in range(12):
    with locks.file_lock(sys.argv[1], "x", patient=True), open(sys.argv[1], "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where another process is here
        file.write("x")
        file.flush()
        time.sleep(random.random() / 500)
        if random.random() < 0.1:
            os.kill(os.getpid(), 9)
        fcntl.flock(file, fcntl.LOCK_UN)
"""


def test_of_many_that_wait_and_are_killed_only_one_at_a_time_has_the_lock(tmp_path):
    jobs = [subprocess.Popen([sys.executable, "-c", CONTENDER, tmp_path / "file", str(seed)], cwd=ROOT,
                             stderr=subprocess.PIPE) for seed in range(8)]
    ends = [(job.communicate(timeout=120)[1], job.returncode) for job in jobs]
    assert {code for _, code in ends} == {0, -9}, ends  # some were killed, and none met another
    assert len((tmp_path / "file").read_text()) > 20
    with file_lock(tmp_path / "file", "x"):
        assert {path.name for path in tmp_path.iterdir()} == {"file", f".file{LOCK_NAME}"}
