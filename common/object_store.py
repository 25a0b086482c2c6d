"""Folders in object storage: s3://bucket/prefix with boto3, or read-only https://host/path.  No torch here.

boto3's transfer manager moves the bytes, in parts over several connections.  Errors are those of remote_sources.py:
Interrupted where another attempt may help, else UserError.  patiently() makes the attempts.
"""

import base64
import fcntl
import os
import random
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

from common.errors import UserError
from common.files import flocked, replacing, room_in_cache
from common.remote_sources import HttpSource, Interrupted, failure, s3_client, status_of

PART_BYTES = 8 << 20  # of a transfer; a smaller file goes in one piece
MOST_PARTS = 10_000  # of a file: the parts of a larger one are larger
CONNECTIONS = 10  # of one transfer
POOL = 64  # connections of a process to one server
ATTEMPTS = 3  # of one request, by boto3, within some seconds
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between the attempts of patiently(), doubled each time
PATIENCE = 900.0  # seconds without an answer after which patiently() gives up
SHA256 = "sha256"  # in the metadata of an uploaded object


class Cancelled(Exception):
    """The transfer was ended by this process."""


def patiently(action: Callable, *, patience: float | None = None, warn: Callable[[str], None] | None = None,
              stop: threading.Event | None = None):
    """The result of action(), tried again while it is Interrupted; says so once.

    UserError after `patience` seconds (default: PATIENCE) of that, Cancelled once `stop` is set.
    """
    give_up, pause, warned = time.monotonic() + (PATIENCE if patience is None else patience), FIRST_PAUSE, False
    stop = stop or threading.Event()
    while True:
        if stop.is_set():
            raise Cancelled
        try:
            return action()
        except Interrupted as error:
            if warn and not warned:
                warn(f"{error}; trying again")
                warned = True
            if time.monotonic() > give_up:
                raise UserError(f"given up: {error}") from None
            stop.wait(max(pause * random.uniform(0.75, 1.25), min(error.wait or 0.0, LONGEST_PAUSE)))
            pause = min(2 * pause, LONGEST_PAUSE)


def is_s3(name) -> bool:
    return str(name).startswith("s3://")


def remote_folder(url: str):
    """The folder of this URL."""
    return S3Folder(url) if is_s3(url) else HttpFolder(url)


class HttpFolder:
    """A folder on an http(s) server, which cannot be listed."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")

    def read_unless(self, name: str, etag: str) -> tuple[bytes | None, str] | None:
        """The bytes of a file, None where it still has this ETag, and its ETag; None where there is no file."""
        try:
            reply = HttpSource(f"{self.url}/{name}").open(0)
        except UserError as error:
            if "answers 404" in str(error):
                return None
            raise
        if reply.version and reply.version == etag:
            reply.blocks.close()
            return None, etag
        content = b"".join(reply.blocks)
        if reply.size is not None and len(content) != reply.size:
            raise Interrupted(f"{self.url}/{name}: {len(content)} bytes received, {reply.size} announced")
        return content, reply.version or ""

    def download(self, name: str, file, stop: threading.Event) -> None:
        """Write the bytes of a file to an open one, from its position on: what is there is not fetched again."""
        reply = HttpSource(f"{self.url}/{name}").open(file.tell())
        file.seek(reply.start)
        for block in reply.blocks:
            if stop.is_set():
                raise Cancelled
            file.write(block)
        if reply.size is not None and file.tell() < reply.size:
            raise Interrupted(f"{self.url}/{name}: {file.tell()} bytes received, {reply.size} announced")


class S3Folder:
    """The objects whose keys begin with that of the URL and a slash; credentials and endpoint as boto3 finds them."""

    def __init__(self, url: str, attempts: int = ATTEMPTS):
        parts = urlsplit(url)
        self.url, self.bucket, key = url.rstrip("/"), parts.netloc, parts.path.strip("/")
        if not self.bucket:
            raise UserError(f"{url}: not of the form s3://bucket/prefix")
        self.prefix = f"{key}/" if key else ""
        self.client = s3_client(attempts, POOL)

    @contextmanager
    def errors(self, name: str):
        """A block whose errors are Interrupted or UserError, with the URL of the object."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError
        from s3transfer.exceptions import RetriesExceededError
        from urllib3.exceptions import HTTPError

        url = f"{self.url}/{name}"
        try:
            yield
        except RetriesExceededError as error:
            raise Interrupted(f"{url}: {error.last_exception}") from None
        except (ClientError, BotoCoreError) as error:
            raise failure(url, error) from None
        except HTTPError as error:
            raise Interrupted(f"{url}: {error}") from None
        except Boto3Error as error:  # of an upload: the text of the one that it hides
            cause = error.__context__
            raise failure(url, cause if isinstance(cause, (ClientError, BotoCoreError)) else error) from None

    def names(self, below: str = "") -> dict[str, tuple[int, str]]:
        """name → size and ETag of the objects whose names begin with `below`."""
        with self.errors(below):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket,
                                                                          Prefix=self.prefix + below)
            return {entry["Key"].removeprefix(self.prefix): (entry["Size"], entry["ETag"])
                    for page in pages for entry in page.get("Contents", [])}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes of an object, or those from `start` to `stop`; None where there is no such object."""
        wanted = {} if stop is None else {"Range": f"bytes={start}-{stop - 1}"}
        with self.errors(name):
            try:
                return self.client.get_object(Bucket=self.bucket, Key=self.prefix + name, **wanted)["Body"].read()
            except self.client.exceptions.NoSuchKey:
                return None

    def read_unless(self, name: str, etag: str) -> tuple[bytes | None, str] | None:
        """The bytes of an object, None where it still has this ETag, and its ETag; None where there is none."""
        from botocore.exceptions import ClientError

        with self.errors(name):
            try:
                found = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name,
                                               **({"IfNoneMatch": etag} if etag else {}))
                return found["Body"].read(), found["ETag"]
            except self.client.exceptions.NoSuchKey:
                return None
            except ClientError as error:
                if status_of(error) == 304:
                    return None, etag
                raise

    def head(self, name: str) -> dict | None:
        """What the server says of an object; None where there is none."""
        from botocore.exceptions import ClientError

        with self.errors(name):
            try:
                return self.client.head_object(Bucket=self.bucket, Key=self.prefix + name, ChecksumMode="ENABLED")
            except ClientError as error:
                if status_of(error) == 404:
                    return None
                raise

    def download(self, name: str, file, stop: threading.Event) -> None:
        """Write the bytes of an object to an open file, in parts."""
        def check(_) -> None:
            if stop.is_set():
                raise Cancelled

        file.seek(0)
        with self.errors(name):
            self.client.download_fileobj(self.bucket, self.prefix + name, file, Callback=check,
                                         Config=transfer_config())

    def put(self, name: str, content: bytes, **conditions) -> str | None:
        """Write a small object; returns its ETag, or None where a condition (IfMatch, IfNoneMatch) does not hold."""
        from botocore.exceptions import ClientError

        with self.errors(name):
            try:
                return self.client.put_object(Bucket=self.bucket, Key=self.prefix + name, Body=content,
                                              **conditions)["ETag"]
            except ClientError as error:
                code = error.response.get("Error", {}).get("Code")
                if conditions and status_of(error) in (404, 409, 412) and code != "NoSuchBucket":
                    return None
                raise

    def upload(self, path, name: str, metadata: dict[str, str], stop: threading.Event | None = None) -> None:
        """Copy a file to an object with these metadata, in parts, and verify what the server has of it.

        An object is the old one, or none, until the new one is whole.
        """
        def check(_) -> None:
            if stop and stop.is_set():
                raise Cancelled

        extra = {"ChecksumAlgorithm": "CRC32", "Metadata": metadata}
        with self.errors(name):
            self.client.upload_file(str(path), self.bucket, self.prefix + name, ExtraArgs=extra, Callback=check,
                                    Config=transfer_config())
        found, size = self.head(name), os.path.getsize(path)
        if found is None or found["ContentLength"] != size:
            raise Interrupted(f"{self.url}/{name}: {size} bytes were uploaded, the server has "
                              f"{found and found['ContentLength']}")
        stored, parts = found.get("ChecksumCRC32"), -(-size // PART_BYTES)
        comparable = parts <= 1 or (found.get("ChecksumType") == "COMPOSITE" and parts <= MOST_PARTS)
        if stored and comparable and stored != (expected := crc32_of_parts(Path(path))):
            raise Interrupted(f"{self.url}/{name}: the server's checksum is {stored}, that of the file {expected}")

    def copy(self, name: str, new_name: str) -> None:
        """Copy an object on the server."""
        with self.errors(name):
            self.client.copy({"Bucket": self.bucket, "Key": self.prefix + name}, self.bucket, self.prefix + new_name,
                             Config=transfer_config())

    def delete(self, names) -> None:
        for name in names:
            with self.errors(name):
                self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def end_abandoned_uploads(self) -> int:
        """End the multipart uploads below the prefix, which killed runs have left; returns their number.

        The caller holds the lock of the prefix.
        """
        with self.errors(""):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket,
                                                                                 Prefix=self.prefix)
            found = [entry for page in pages for entry in page.get("Uploads", [])
                     if entry["Key"].startswith(self.prefix)]
            for entry in found:
                self.client.abort_multipart_upload(Bucket=self.bucket, Key=entry["Key"], UploadId=entry["UploadId"])
        return len(found)


@contextmanager
def staged_file(url: str):
    """Yield the path of a local file that becomes the object when the block ends."""
    parent, _, name = url.rpartition("/")
    folder = S3Folder(parent)
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary) / name
        patiently(lambda: folder.upload(Path(temporary) / name, name, {}))


# --- local copies, each with the ETag of its object beside it ---

def etag_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.etag")


def mark_as_copy(path: Path, etag: str) -> None:
    status = path.stat()
    with replacing(etag_path(path)) as temporary:
        temporary.write_text(f"{etag} {status.st_size} {status.st_mtime_ns}", encoding="utf-8")


def is_copy(path: Path, etag: str) -> bool:
    return etag_of_copy(path) == etag


def etag_of_copy(path: Path) -> str:
    """The ETag of what a file is a copy of; "" where it is none, or has changed."""
    with suppress(OSError, ValueError):
        status = path.stat()
        etag, size, modified = etag_path(path).read_text(encoding="utf-8").rsplit(" ", 2)
        return etag if (int(size), int(modified)) == (status.st_size, status.st_mtime_ns) else ""
    return ""


def small_copy(folder, name: str, path: Path) -> bytes | None:
    """The bytes of a small file, of which a copy is kept at `path`; None where there is none, and then no copy is left.

    Of the processes of a server, and of one start after the other, one fetches it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with flocked(path.with_name(f".{path.name}.lock"), fcntl.LOCK_EX):
        known = etag_of_copy(path)
        found = folder.read_unless(name, known)
        if found is None:
            path.unlink(missing_ok=True)
            return None
        content, etag = found
        if content is None:
            return path.read_bytes()
        with room_in_cache(path):
            with replacing(path) as temporary:
                temporary.write_bytes(content)
            mark_as_copy(path, etag)
        return content


def transfer_config():
    from boto3.s3.transfer import TransferConfig

    return TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=CONNECTIONS,
                          preferred_transfer_client="classic")


def crc32_of_parts(path: Path) -> str:
    """The checksum of a file as S3 gives it for one that was uploaded in parts of PART_BYTES."""
    with open(path, "rb") as file:
        parts = [zlib.crc32(part).to_bytes(4, "big") for part in iter(lambda: file.read(PART_BYTES), b"")]
    if path.stat().st_size < PART_BYTES:
        return base64.b64encode(parts[0] if parts else bytes(4)).decode()
    return f"{base64.b64encode(zlib.crc32(b''.join(parts)).to_bytes(4, 'big')).decode()}-{len(parts)}"
