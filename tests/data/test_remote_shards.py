"""Shards in object storage: found, fetched in the order of need, verified, and read as those of a folder."""

import json
import shutil
from collections import Counter
from contextlib import closing
from pathlib import Path

import boto3
import pytest

import pack_pretraining_data_pytorch
import pytorch_packed_data_checker
import upload_shards
from common import cli, object_store
from common.cli import format_bytes
from common.download import file_checksum
from common.errors import UserError
from common.object_locks import prefix_lock
from data import shard_cache
from data.shard_cache import Fetching, NoRoom, fetch_shard
from data.shard_fetcher import ShardFetcher
from data.shard_reader import ShardReader
from data.shards import INDEX, find_shards, metadata_path, read_rows
from data.token_counts import stored_counts
from tests.support import samples, synthetic
from tests.support.bad_servers import file_server, proxy_to, serving
from tests.support.object_store import bucket, objects, put_folder, s3_server
from tests.support.samples import batch_stream
from tests.support.shaped_link import shaped_link

ROWS = (7, 13, 5, 9, 21)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server with the set of the folder `data` at s3://data/indexed and, without an index, s3://data/plain."""
    folder = tmp_path_factory.mktemp("sets")
    samples.write_dataset(folder / "data", ROWS)
    samples.write_dataset(folder / "dynamic", ROWS, write=synthetic.write_shard_without_masks)
    with s3_server() as url:
        put_folder(folder / "data", "plain")
        upload_shards.main(["--input_dir", folder / "data", "--output_dir", "s3://data/indexed"])
        upload_shards.main(["--input_dir", folder / "dynamic", "--output_dir", "s3://data/dynamic"])
        yield url, folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache for each test, and no patience."""
    monkeypatch.setenv("BERT_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("FIRST_PAUSE", "LONGEST_PAUSE"):
        monkeypatch.setattr(object_store, name, 0.01)
    shard_cache.opened_folder.cache_clear()
    return tmp_path / "cache"


def cached_bytes(folder: Path) -> int:
    return sum(shard_cache.size_of(path) for path in folder.rglob("*") if path.suffix in (".hdf5", ".part"))


@pytest.mark.parametrize("prefix", ["indexed", "plain"])
def test_remote_shards_are_known_before_any_is_fetched(server, cache, prefix):
    local = find_shards(server[1] / "data")
    with ShardReader() as reader:
        found = find_shards(f"s3://data/{prefix}", reader=reader)
    assert not list(cache.rglob("*.hdf5"))
    names = ("rows", "row_bytes", "packed", "sequence_length", "prediction_slots", "max_sequences", "rule",
             "file_bytes")
    for here, there in zip(local, found, strict=True):
        assert [getattr(here, name) for name in names] == [getattr(there, name) for name in names]
        assert here.path.name == there.path.name
    rows = read_rows(found[1])
    assert all((rows[key] == values).all() for key, values in read_rows(local[1]).items())
    assert [path.name for path in cache.rglob("*.hdf5")] == [local[1].path.name]


@pytest.mark.parametrize("prefix", ["indexed", "plain", "dynamic"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stream_over_remote_shards_yields_the_batches_of_one_over_a_folder(server, cache, prefix, world_size):
    folder = server[1] / ("dynamic" if prefix == "dynamic" else "data")
    most = int(0.7 * sum(path.stat().st_size for path in folder.glob("*.hdf5")))
    largest = 0
    with ShardReader() as reader:
        for rank in range(world_size):
            here = batch_stream(find_shards(folder), 2, rank=rank, world_size=world_size, reader=reader)
            there = batch_stream(find_shards(f"s3://data/{prefix}", reader=reader, most_cached=most), 2, rank=rank,
                                 world_size=world_size, reader=reader)
            there.ends_at(2 * sum(ROWS))
            for _ in range(2 * sum(ROWS) // (2 * world_size)):
                one, other = next(here), next(there)
                assert all((one[key] == other[key]).all() for key in one)
                largest = max(largest, cached_bytes(cache))
            here.close(), there.close()
    assert 0 < largest <= most


def test_a_stream_fetches_what_its_ranks_read_until_the_run_ends_and_nothing_else(server, cache):
    """Each shard once: a second epoch reads what is still there."""
    gets = []

    def counting(path, headers):
        gets.append(path)
        return proxy_to(server[0])(path, headers)

    with serving(counting) as proxy, pytest.MonkeyPatch.context() as patch, ShardReader() as reader:
        found = find_shards("s3://data/indexed", reader=reader)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        stream = batch_stream(found, 3, reader=reader)
        first_two = dict.fromkeys(rows[1] for row in range(0, 18, 3) for rows in stream.ranges_read(row))
        stream.ends_at(18)
        for _ in range(6):
            next(stream)
        stream.close()
        assert {path.rpartition("/")[2] for path in gets} == {found[number].path.name for number in first_two}
        stream = batch_stream(found, 3, reader=reader)
        stream.ends_at(3 * sum(ROWS))
        for _ in range(sum(ROWS)):
            next(stream)
        stream.close()
    assert Counter(path.rpartition("/")[2] for path in gets) == {shard.path.name: 2 for shard in found}  # HEAD and GET


def test_what_comes_next_is_what_the_rounds_to_come_read():
    shards = [synthetic_shard(number, rows) for number, rows in enumerate((3, 50, 1, 8, 30, 2))]
    for world_size, ranks in ((1, range(1)), (4, range(2, 4)), (4, range(4))):
        streams = [batch_stream(shards, 2, rank=rank, world_size=world_size) for rank in ranks]
        order, stride = streams[0].order, streams[0].order.stride
        for row in range(0, 96, stride):
            needed = dict.fromkeys(piece for later in range(row, min(row + 94, 160), stride) for stream in streams
                                   for _, piece, _, _ in stream.order.own_ranges(later, {}))
            found = order.upcoming(row, 160, ranks, {})
            assert set(found) >= set(needed) and set(found[:1]) == set(list(needed)[:1])
        for stream in streams:
            stream.close()


def synthetic_shard(number: int, rows: int):
    from data.shards import Shard

    return Shard(path=Path(f"{number}.hdf5"), rows=rows, row_bytes=1, packed=False, sequence_length=8,
                 prediction_slots=2, max_sequences=1)


def test_a_shard_that_changed_on_the_server_is_named(server, cache, tmp_path):
    shutil.copytree(server[1] / "data", tmp_path / "set")
    upload_shards.main(["--input_dir", tmp_path / "set", "--output_dir", "s3://data/changing"])
    put_folder(tmp_path / "set", "changing_plain", "*.hdf5")
    with ShardReader() as reader:
        found = [find_shards(f"s3://data/{prefix}", reader=reader) for prefix in ("changing", "changing_plain")]
    for prefix in ("changing", "changing_plain"):
        content = bytearray(objects(f"{prefix}/")[found[0][2].path.name])
        content[-1] ^= 1
        bucket().put_object(Key=f"{prefix}/{found[0][2].path.name}", Body=bytes(content))
    for shards, since in zip(found, ("since its index was made", "since the run began"), strict=True):
        with pytest.raises(UserError, match=f"{shards[2].remote.url}: .*it changed on the server {since}"):
            read_rows(shards[2])
        assert not list(cache.rglob("*.part"))


def test_a_damaged_copy_is_fetched_again(server, cache):
    shard = find_shards("s3://data/indexed")[0]
    read_rows(shard)
    content = shard.path.read_bytes()
    shard.path.write_bytes(content[:-1] + b"?")
    read_rows(shard)
    assert shard.path.read_bytes() == content


@pytest.mark.parametrize("faults", [["503"] * 2, ["reset"] * 2, ["drop"] * 2, ["drop", "503", "reset"]])
def test_a_misbehaving_server_still_gives_the_right_shard(server, cache, monkeypatch, faults):
    shard = find_shards("s3://data/indexed")[3]
    with serving(proxy_to(server[0]), faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fetch_shard(shard.remote, shard.path, Fetching())
    assert file_checksum(shard.path) == shard.remote.sha256


def test_a_server_that_lies_about_lengths_or_is_away_ends_in_a_clear_error(server, cache, monkeypatch):
    shard = find_shards("s3://data/indexed")[3]

    def shortened(path, headers):
        status, sent, body = proxy_to(server[0])(path, headers)
        return status, sent | {"Content-Length": str(len(body) // 2)}, body[:len(body) // 2]

    monkeypatch.setattr(object_store, "PATIENCE", 0.1)
    with serving(shortened) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(UserError, match=shard.path.name):
            fetch_shard(shard.remote, shard.path, Fetching())
    shard_cache.opened_folder.cache_clear()
    warnings = []
    with pytest.raises(UserError, match="given up"):  # the proxy is gone
        fetch_shard(shard.remote, shard.path, Fetching(warn=warnings.append))
    assert len(warnings) == 1 and "trying again" in warnings[0]
    assert not shard.path.exists() and not list(cache.rglob("*.part"))


def test_a_long_wait_says_what_for_and_how_much_of_it_is_here(server, cache, monkeypatch, capsys):
    """As where a store slows to a crawl."""
    shard = find_shards("s3://data/indexed")[3]
    monkeypatch.setattr(cli, "FIRST_NOTICE", 0.1)
    with shaped_link(server[0], latency=0.4) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.url)
        with closing(ShardFetcher()) as fetcher:
            fetcher.wait_for(shard)
            fetcher.wait_for(shard)  # it is here
    assert file_checksum(shard.path) == shard.remote.sha256
    said = capsys.readouterr().err.splitlines()
    assert 1 <= len(said) <= 3 and said[0] == (f"warning: waiting for {shard.remote.url}: 0 B of "
                                              f"{format_bytes(shard.remote.nbytes)} are here after 0 s")


def test_room_is_made_of_what_is_needed_last(server):
    shards = find_shards("s3://data/indexed", most_cached=1)
    most = sum(shard.file_bytes for shard in shards[:3])
    shards = find_shards("s3://data/indexed", most_cached=most)
    paths = [shard.path for shard in shards]
    for shard in shards[:3]:
        fetch_shard(shard.remote, shard.path, Fetching(paths))
    with pytest.raises(NoRoom):
        fetch_shard(shards[3].remote, paths[3], Fetching(paths))
    assert [path.exists() for path in paths] == [True] * 3 + [False] * 2
    needed = [paths[3], paths[0], paths[2], paths[1]]  # 1 is needed last
    fetch_shard(shards[3].remote, paths[3], Fetching(needed))
    assert paths[3].exists() and not paths[1].exists() and paths[0].exists()
    with pytest.raises(UserError, match="--shard_cache_gb"):
        tight = find_shards("s3://data/indexed", most_cached=10)[0]
        tight.path.unlink(missing_ok=True)
        fetch_shard(tight.remote, tight.path, Fetching())


def test_what_a_killed_process_was_fetching_takes_no_room(server, cache):
    shards = find_shards("s3://data/indexed")
    shards[0].path.parent.mkdir(parents=True, exist_ok=True)
    left = shards[1].path.with_name(f".{shards[1].path.name}.part")
    left.write_bytes(b"?" * 100)
    fetch_shard(shards[0].remote, shards[0].path, Fetching())
    assert not left.exists()


def test_an_http_server_with_an_index_serves_a_set(server, cache):
    folder = server[1] / "data"

    def files(path, headers):
        file = folder / path.rpartition("/")[2]
        return file_server(file.read_bytes())(path, headers) if file.is_file() else (404, {"Content-Length": "0"}, b"")

    with serving(files, ["drop"]) as proxy:
        found = find_shards(f"{proxy.url}/wiki/data")
        assert [shard.rows for shard in found] == [shard.rows for shard in find_shards(folder)]
        assert (read_rows(found[4])["input_ids"] == read_rows(find_shards(folder)[4])["input_ids"]).all()
        with pytest.raises(UserError, match=f"no {INDEX} in it"):
            index = (folder / INDEX).read_bytes()
            (folder / INDEX).unlink()
            try:
                find_shards(f"{proxy.url}/wiki/data")
            finally:
                (folder / INDEX).write_bytes(index)


@pytest.mark.parametrize("change, message", [
    (lambda index: index["shards"][0].update(rows=-1), "rows is -1"),
    (lambda index: index["shards"][0].update(name="../x.hdf5"), "not the name of a shard"),
    (lambda index: index["shards"][0].pop("bytes"), "not an index of shards|bytes"),
    (lambda index: index.update(format=7), "of format 7"),
    (lambda index: index.update(shards=3), "not an index of shards"),
])
def test_an_index_that_is_none_is_one_line(server, tmp_path, change, message):
    index = json.loads((server[1] / "data" / INDEX).read_text())
    change(index)
    bucket().put_object(Key=f"bad/{INDEX}", Body=json.dumps(index).encode())
    with pytest.raises(UserError, match=message):
        shards = find_shards("s3://data/bad")
        assert shards[0].file_bytes == 0  # an entry without its bytes
        raise UserError("bytes")


def test_an_index_that_does_not_fit_the_shards_is_one_line(server, tmp_path):
    index = json.loads((server[1] / "data" / INDEX).read_text())
    index["shards"][0]["sha256"] = "0" * 64
    put_folder(server[1] / "data", "unfit", "*.hdf5")
    bucket().put_object(Key=f"unfit/{INDEX}", Body=json.dumps(index).encode())
    with pytest.raises(UserError, match="0000 in the index: it changed"):
        read_rows(find_shards("s3://data/unfit")[0])


def test_token_counts_and_metadata_come_with_the_set(server, tmp_path):
    counts = stored_counts(find_shards("s3://data/indexed"), synthetic.VOCAB_SIZE)
    assert counts.sum() > 0 and len(counts) == synthetic.VOCAB_SIZE
    shutil.copytree(server[1] / "data", tmp_path / "set")
    metadata_path(tmp_path / "set").write_text('{"avg_seq_per_sample": 1.5}')
    upload_shards.main(["--input_dir", tmp_path / "set", "--output_dir", "s3://data/with"])
    found = find_shards("s3://data/with")
    assert json.loads(metadata_path(found[0].path.parent).read_text()) == {"avg_seq_per_sample": 1.5}
    bucket().Object("with_metadata.json").delete()
    assert not metadata_path(find_shards("s3://data/with")[0].path.parent).exists()


def test_an_upload_goes_on_and_is_verified_and_others_files_are_refused(server, tmp_path, capsys):
    shutil.copytree(server[1] / "data", tmp_path / "set")
    url, words = "s3://data/mirror", ["--input_dir", tmp_path / "set", "--output_dir", "s3://data/mirror"]
    assert upload_shards.main(words) == 0
    assert upload_shards.main(words) == 0
    assert f"0 shards of 0 B uploaded, {len(ROWS)} were there" in capsys.readouterr().out
    assert upload_shards.main(["--verify", url]) == 0
    name = sorted(path.name for path in (tmp_path / "set").glob("*.hdf5"))[0]
    bucket().put_object(Key=f"mirror/{name}", Body=b"other")
    bucket().put_object(Key="mirror/stranger.hdf5", Body=b"other")
    assert upload_shards.main(["--verify", url]) == 1
    faults = capsys.readouterr().err
    assert f"{url}/{name}: 5 bytes" in faults and "stranger.hdf5: the index does not name it" in faults
    with pytest.raises(UserError, match="holds stranger.hdf5, which is none of the set's files"):
        upload_shards.main(words)
    assert upload_shards.main([*words, "--overwrite"]) == 0 and upload_shards.main(["--verify", url]) == 0
    bucket().put_object(Key="mirror/thesis.pdf", Body=b"other")
    with pytest.raises(UserError, match="holds thesis.pdf"):
        upload_shards.main([*words, "--overwrite"])


def test_missing_credentials_are_one_line(server, monkeypatch):
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    with pytest.raises(UserError, match="no credentials"):
        find_shards("s3://data/indexed")


@pytest.mark.parametrize("code, status, message", [
    ("AccessDenied", 403, "may not do that"), ("RequestTimeTooSkewed", 403, "the clock of this machine"),
    ("InvalidAccessKeyId", 403, "does not know these credentials"), ("NoSuchBucket", 404, "no such bucket"),
])
def test_what_the_user_can_mend_is_said_in_words(server, monkeypatch, code, status, message):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>m</Message></Error>".encode()
    answer = (status, {"Content-Length": str(len(body)), "Content-Type": "application/xml"}, body)
    with serving(lambda *_: answer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(UserError, match=message):
            find_shards("s3://data/indexed")
        with pytest.raises(UserError, match=f"^--output_dir X: cannot be written: .*{message}"), \
                prefix_lock("s3://data/run", "--output_dir X"):
            pass


def test_a_set_is_packed_and_prepared_into_object_storage(server, tmp_path, capsys):
    words = ["--max_sequence_length", samples.SEQUENCE_LENGTH, "--max_predictions_per_sequence", samples.PREDICTIONS,
             "--n_processes", 1, "--disable_progress_bar"]
    pack_pretraining_data_pytorch.main(["--input_dir", server[1] / "data", "--output_dir", tmp_path / "packed", *words])
    assert json.loads((tmp_path / "packed" / INDEX).read_text())["shards"][0]["sequences"] == sum(ROWS)
    words += ["--input_dir", "s3://data/indexed", "--output_dir", "s3://data/packed"]
    pack_pretraining_data_pytorch.main(words)
    stored = objects("packed")
    for path in (tmp_path / "packed").glob("[!.]*"):
        assert stored[f"/{path.name}"] == path.read_bytes()
    here, there = (json.loads(content) for content in (metadata_path(tmp_path / "packed").read_bytes(),
                                                       stored["_metadata.json"]))
    assert {key for key in here if here[key] != there[key]} == {"input_dir"}
    assert upload_shards.main(["--verify", "s3://data/packed"]) == 0
    assert pytorch_packed_data_checker.main(["--input_dir", "s3://data/packed", "--unpacked_dir", "s3://data/indexed",
                                             "--n_processes", 1, "--disable_progress_bar"]) == 0
    with pytest.raises(UserError, match="holds mixed_strategies_part_0.hdf5"):
        pack_pretraining_data_pytorch.main(words)
    pack_pretraining_data_pytorch.main([*words, "--overwrite"])
    assert objects("packed") == stored
