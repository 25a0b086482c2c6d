"""Claims about files fetched from http and S3 servers, most of which misbehave, and about files written atomically."""

import hashlib
import os
import random
from multiprocessing import get_context

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.download import fetch, local_file
from common.errors import UserError
from common.files import replacing, replacing_files
from data.preparation.named_files import named_files
from tests.support.bad_servers import file_server, proxy_to, serving
from tests.support.object_store import bucket, s3_server

CONTENT = random.Random(1).randbytes(3_000_003)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
QUICK = {"first_wait": 0.001}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BERT_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("faults", [[], ["503"] * 5, ["reset"] * 3, ["drop"] * 6, ["drop", "503", "reset", "drop"]])
@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no_ranges"])
def test_a_misbehaving_server_still_gives_the_right_file(tmp_path, faults, ranges):
    with serving(file_server(CONTENT, ranges), faults) as server:
        path = fetch(f"{server.url}/dump.bz2", tmp_path / "dump.bz2", sha256=SHA256, **QUICK)
    assert path.read_bytes() == CONTENT
    assert not list(tmp_path.glob(".*.part"))


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path):
    with serving(file_server(CONTENT), ["drop"] + ["503"] * 3) as server:
        with pytest.raises(UserError, match="attempts without progress: 2"):
            fetch(f"{server.url}/a", tmp_path / "a", tries=2, **QUICK)
        assert not (tmp_path / "a").exists()
        fetch(f"{server.url}/a", tmp_path / "a", **QUICK)
        assert server.requests[-1]["Range"] == f"bytes={len(CONTENT) // 2}-"
    assert (tmp_path / "a").read_bytes() == CONTENT


def test_a_file_that_changed_on_the_server_is_not_mixed_with_its_older_part(tmp_path):
    newer = os.urandom(len(CONTENT))
    with serving(file_server(CONTENT, version='"old"'), ["drop", "503"]) as server:
        with pytest.raises(UserError):
            fetch(f"{server.url}/a", tmp_path / "a", tries=1, **QUICK)
        server.answer = file_server(newer, version='"new"')
        assert fetch(f"{server.url}/a", tmp_path / "a", **QUICK).read_bytes() == newer


def test_without_a_version_nothing_is_appended_to_an_older_part(tmp_path):
    newer = os.urandom(len(CONTENT))
    with serving(file_server(CONTENT, version=None), ["drop", "503"]) as server:
        with pytest.raises(UserError):
            fetch(f"{server.url}/a", tmp_path / "a", tries=1, **QUICK)
        server.answer = file_server(newer, version=None)
        assert fetch(f"{server.url}/a", tmp_path / "a", **QUICK).read_bytes() == newer


def test_a_server_that_hands_out_a_part_at_a_time_gives_the_whole(tmp_path):
    def stingy(path, headers):
        status, sent, body = file_server(CONTENT)(path, headers)
        if status != 206 or len(body) < 700_000:
            return status, sent, body
        start = len(CONTENT) - len(body)
        return 206, sent | {"Content-Length": "700000",
                            "Content-Range": f"bytes {start}-{start + 699_999}/{len(CONTENT)}"}, body[:700_000]

    with serving(stingy, ["drop"]) as server:
        assert fetch(f"{server.url}/a", tmp_path / "a", **QUICK).read_bytes() == CONTENT
        assert len(server.requests) == 4


def test_a_server_that_ignores_if_range_is_not_believed(tmp_path):
    newer = os.urandom(len(CONTENT))

    def careless(path, headers):
        status, sent, body = file_server(newer)(path, {"Range": headers["Range"]} if "Range" in headers else {})
        return status, sent | {"ETag": '"new"'}, body

    with serving(file_server(CONTENT, version='"old"'), ["drop", "503"]) as server:
        with pytest.raises(UserError):
            fetch(f"{server.url}/a", tmp_path / "a", tries=1, **QUICK)
        server.answer = careless
        assert fetch(f"{server.url}/a", tmp_path / "a", **QUICK).read_bytes() == newer


@pytest.mark.parametrize("checksum", [{"sha256": "0" * 64}, {"sha1": "0" * 40}])
def test_a_wrong_checksum_leaves_the_old_file(tmp_path, checksum):
    (tmp_path / "a").write_text("what was there")
    with serving(file_server(CONTENT)) as server, pytest.raises(UserError, match="expected 0000"):
        fetch(f"{server.url}/a", tmp_path / "a", **checksum, **QUICK)
    assert (tmp_path / "a").read_text() == "what was there"


def test_a_file_of_unknown_size_without_checksum_is_refused(tmp_path):
    with serving(file_server(CONTENT, sized=False), ["drop"]) as server:
        with pytest.raises(UserError, match="does not state the size"):
            fetch(f"{server.url}/a", tmp_path / "a", **QUICK)
        assert fetch(f"{server.url}/a", tmp_path / "b", sha256=SHA256, **QUICK).read_bytes() == CONTENT


def test_a_missing_file_and_an_absent_server_end_in_one_clear_error(tmp_path):
    with serving(lambda *_: (404, {"Content-Length": "0"}, b"")) as server:
        with pytest.raises(UserError, match="the server answers 404"):
            fetch(f"{server.url}/a", tmp_path / "a", **QUICK)
        url = server.url
    with pytest.raises(UserError, match="attempts without progress: 2"):
        fetch(f"{url}/a", tmp_path / "a", tries=2, **QUICK)
    with pytest.raises(UserError, match="neither http"):
        fetch("ftp://example.org/a", tmp_path / "a")


def test_a_local_copy_is_fetched_once_and_again_when_the_server_has_another():
    with serving(file_server(CONTENT)) as server:
        path = local_file(f"{server.url}/vocab.txt")
        assert local_file(f"{server.url}/vocab.txt") == path and path.read_bytes() == CONTENT
        server.answer = file_server(b"newer", version='"v2"')
        assert local_file(f"{server.url}/vocab.txt").read_bytes() == b"newer"
        url = server.url
    assert local_file(f"{url}/vocab.txt").read_bytes() == b"newer", "the copy serves while the server is away"


def test_an_interrupted_update_is_not_taken_for_done():
    with serving(file_server(CONTENT)) as server:
        path = local_file(f"{server.url}/vocab.txt")
        newer = os.urandom(len(CONTENT))
        server.answer, server.faults = file_server(newer, version='"v2"'), [None, "drop"] + ["reset"] * 2
        with pytest.raises(UserError, match="given up"):
            fetch(f"{server.url}/vocab.txt", path, tries=1, **QUICK)
        assert path.read_bytes() == CONTENT
        server.faults.clear()
        assert local_file(f"{server.url}/vocab.txt").read_bytes() == newer


def fetch_to(url, path):
    fetch(url, path, sha256=SHA256, **QUICK)


def test_two_processes_that_want_the_same_file_fetch_it_once(tmp_path):
    with serving(file_server(CONTENT)) as server:
        processes = [get_context("spawn").Process(target=fetch_to, args=(f"{server.url}/a", tmp_path / "a"))
                     for _ in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert len(server.requests) == 1
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.fixture(scope="module")
def moto():
    with s3_server() as url:
        bucket().put_object(Key="deep/file.bin", Body=CONTENT)
        yield url


@pytest.mark.parametrize("faults", [[], ["503"] * 5, ["reset"] * 3, ["drop"] * 6, ["drop", "503", "reset", "drop"]])
@pytest.mark.parametrize("ignore_ranges", [False, True], ids=["ranges", "no_ranges"])
def test_a_misbehaving_s3_server_still_gives_the_right_file(moto, tmp_path, monkeypatch, faults, ignore_ranges):
    with serving(proxy_to(moto, ignore_ranges), faults) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        path = fetch("s3://data/deep/file.bin", tmp_path / "file.bin", **QUICK)
        assert len(server.requests) == len(faults) + 1
    assert path.read_bytes() == CONTENT


def test_an_s3_object_that_changes_under_the_download_is_fetched_anew(moto, tmp_path, monkeypatch):
    bucket().put_object(Key="changing", Body=CONTENT)
    with serving(proxy_to(moto), ["drop", "503"]) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with pytest.raises(UserError):
            fetch("s3://data/changing", tmp_path / "a", tries=1, **QUICK)
        newer = os.urandom(len(CONTENT))
        monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
        bucket().put_object(Key="changing", Body=newer)
        assert fetch("s3://data/changing", tmp_path / "a", **QUICK).read_bytes() == newer


def test_what_s3_does_not_have_ends_in_a_clear_error(moto, tmp_path):
    for url in ("s3://data/missing", "s3://nobucket/key", "s3://data"):
        with pytest.raises(UserError, match=url):
            fetch(url, tmp_path / "a", **QUICK)


def test_the_objects_below_an_s3_prefix_are_read_by_their_endings(moto):
    for key in ("texts/a.jsonl", "texts/b/c.TXT", "texts/x.pdf", "texts/.hidden.txt"):
        bucket().put_object(Key=key, Body=key.encode())
    found = named_files(["s3://data/texts/"], "*.jsonl *.txt")
    assert [path.read_text() for path in found] == ["texts/a.jsonl", "texts/b/c.TXT"]
    with pytest.raises(UserError, match="s3://data/deep/: no \\*.txt object below it"):
        named_files(["s3://data/deep/"], "*.txt")


@given(st.integers(0, 50))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_exception_leaves_what_was_there(tmp_path, size):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as temporary:
        temporary.write_bytes(b"n" * size)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), replacing_files(tmp_path, ["a", "b"]) as temporaries:
        temporaries[1].write_bytes(b"n" * size)
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"
