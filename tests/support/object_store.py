"""moto's S3 server in a process of its own, with the bucket `data`, and what tests do with it."""

import subprocess
import sys
from contextlib import contextmanager

import pytest

from data import shard_cache

PROGRAM = """
import threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
threading.Event().wait()
"""
VARIABLES = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1",
             "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def s3_server():
    """A running server; yields its URL.  boto3 uses it in the block, also in child processes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VARIABLES.items():
            patch.setenv(name, value)
        process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, encoding="utf-8",
                                   stderr=subprocess.DEVNULL)
        try:
            url = process.stdout.readline().strip()
            patch.setenv("AWS_ENDPOINT_URL", url)
            bucket().create()
            shard_cache.opened_folder.cache_clear()  # clients of a server before this one
            yield url
        finally:
            process.kill()
            process.wait()


def bucket(name: str = "data"):
    import boto3

    return boto3.resource("s3").Bucket(name)


def objects(prefix: str) -> dict[str, bytes]:
    """The objects below a prefix, by what follows it in their names."""
    return {entry.key.removeprefix(prefix): entry.get()["Body"].read()
            for entry in bucket().objects.filter(Prefix=prefix)}


def put_folder(folder, prefix: str, pattern: str = "*") -> str:
    """Upload the files of a folder as they are; returns the URL of the prefix."""
    for path in folder.glob(pattern):
        bucket().upload_file(str(path), f"{prefix}/{path.name}")
    return f"s3://data/{prefix}"
