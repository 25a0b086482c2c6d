"""Reads a remote file from any offset: http(s):// with `requests`, s3:// with boto3.  No torch here.

open(offset) of both sources returns a Reply.  Errors that another attempt may avoid raise Interrupted, and
download.fetch tries again; the others (404, no credentials) raise UserError.
"""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from common.errors import UserError

CONNECT_SECONDS, READ_SECONDS = 10, 60
BLOCK = 1 << 18
CLIENT_LOCK = threading.Lock()  # boto3 makes clients in one thread at a time only
RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
# What the user can mend, by S3's code or boto3's error
REASONS = {
    "NoCredentialsError": "no credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws or a role)",
    "InvalidAccessKeyId": "the server does not know these credentials",
    "SignatureDoesNotMatch": "the server does not accept these credentials",
    "ExpiredToken": "these credentials have expired",
    "RequestTimeTooSkewed": "the clock of this machine differs from the server's by too much: set it",
    "NoSuchBucket": "no such bucket",
    "NoSuchKey": "no such object",
    "AccessDenied": "these credentials may not do that (AccessDenied)",
    "403": "these credentials may not do that (403)",
    "404": "no such object or bucket",
}


class Interrupted(Exception):
    """The transfer failed, and may succeed later.  `wait`: seconds the server asks for; `damaged`: discard the data."""

    def __init__(self, reason, wait: float | None = None, damaged: bool = False):
        super().__init__(str(reason))
        self.wait, self.damaged = wait, damaged


@dataclass(frozen=True)
class Reply:
    """A response that is being read.  `start`: offset of its first byte; `size`: of the whole file, None if unknown."""

    start: int
    size: int | None
    version: str | None  # identifies this state of the file (ETag or date); None if the server gives none
    framed: bool  # whether a lost connection is noticed even if the size is unknown
    blocks: Iterator[bytes]


def remote_source(url: str):
    scheme = urlsplit(url).scheme
    if scheme in ("http", "https"):
        return HttpSource(url)
    if scheme == "s3":
        return S3Source(url)
    raise UserError(f"{url}: neither http(s):// nor s3://")


class HttpSource:
    """A file on an http(s) server.  HTTPS_PROXY, REQUESTS_CA_BUNDLE and the like are respected."""

    def __init__(self, url: str):
        import requests

        self.url, self.requests = url, requests
        self.session = requests.Session()

    def open(self, offset: int, version: str | None = None) -> Reply:
        """The bytes from `offset` on, or from 0 if the server ignores ranges or the file is no longer `version`."""
        headers = {"Accept-Encoding": "identity"}  # the file itself, not a compressed form with other offsets
        if offset:
            headers |= {"Range": f"bytes={offset}-"} | ({"If-Range": version} if version else {})
        try:
            response = self.session.get(self.url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
        except self.requests.RequestException as error:
            reason = getattr(error.args[0], "reason", error) if error.args else error
            raise Interrupted(f"no answer from {urlsplit(self.url).netloc} ({type(reason).__name__})") from None
        if response.status_code == 416:  # the offset is beyond the end: the file has changed
            response.close()
            return self.open(0)
        self.check_status(response)
        return self.reply(response)

    def check_status(self, response) -> None:
        if response.status_code in RETRYABLE:
            wait = response.headers.get("Retry-After", "")
            response.close()
            raise Interrupted(f"{self.url}: the server answers {response.status_code} {response.reason}",
                              float(wait) if wait.isdecimal() else None)
        if response.status_code not in (200, 206):
            response.close()
            raise UserError(f"{self.url}: the server answers {response.status_code} {response.reason}")

    def reply(self, response) -> Reply:
        start, size = 0, response.headers.get("Content-Length")
        size = int(size) if size else None
        if response.status_code == 206:
            start, size = content_range(self.url, response.headers.get("Content-Range", ""))
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if version and version.startswith("W/"):
            version = response.headers.get("Last-Modified")  # a weak ETag does not promise equal bytes
        framed = response.headers.get("Transfer-Encoding", "").lower() == "chunked"
        return Reply(start, size, version, framed, self.blocks(response))

    def blocks(self, response) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError

        try:
            with response:
                yield from response.raw.stream(BLOCK, decode_content=False)
        except (self.requests.RequestException, HTTPError, OSError) as error:
            raise Interrupted(error) from None


class S3Source:
    """An object on S3 or a compatible server (AWS_ENDPOINT_URL); credentials as boto3 finds them."""

    def __init__(self, url: str):
        parts = urlsplit(url)
        self.url, self.bucket, self.key = url, parts.netloc, parts.path.lstrip("/")
        if not self.bucket or not self.key:
            raise UserError(f"{url}: not of the form s3://bucket/key")
        self.client = s3_client(attempts=1)  # download.fetch does the retries, as for http

    def open(self, offset: int, version: str | None = None) -> Reply:
        """The bytes from `offset` on; `version` is not compared here."""
        from botocore.exceptions import BotoCoreError, ClientError

        wanted = {"Range": f"bytes={offset}-"} if offset else {}
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key, **wanted)
        except ClientError as error:
            if offset and status_of(error) == 416:  # the offset is beyond the end: the object has changed
                return self.open(0)
            raise failure(self.url, error) from None
        except BotoCoreError as error:
            raise failure(self.url, error) from None
        start, size = 0, answer["ContentLength"]
        if "ContentRange" in answer:
            start, size = content_range(self.url, answer["ContentRange"])
        return Reply(start, size, answer.get("ETag"), True, self.blocks(answer["Body"]))

    def blocks(self, body) -> Iterator[bytes]:
        from botocore.exceptions import BotoCoreError, FlexibleChecksumError, HTTPClientError
        from urllib3.exceptions import HTTPError

        try:
            yield from body.iter_chunks(BLOCK)
        except FlexibleChecksumError as error:
            raise Interrupted(error, damaged=True) from None
        except (BotoCoreError, HTTPClientError, HTTPError, OSError) as error:
            raise Interrupted(error) from None


def s3_client(attempts: int, connections: int = 10):
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, max_pool_connections=connections,
                    retries={"total_max_attempts": attempts, "mode": "standard"})
    try:
        with CLIENT_LOCK:
            return boto3.client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"s3://: {error}") from None


def s3_keys(url: str) -> list[str]:
    """The URLs of all objects whose keys start with that of `url`, in order."""
    from botocore.exceptions import BotoCoreError, ClientError

    parts = urlsplit(url)
    prefix = parts.path.lstrip("/")
    try:
        pages = s3_client(attempts=5).get_paginator("list_objects_v2").paginate(Bucket=parts.netloc, Prefix=prefix)
        return [f"s3://{parts.netloc}/{entry['Key']}" for page in pages for entry in page.get("Contents", [])]
    except (ClientError, BotoCoreError) as error:
        raise UserError(str(failure(url, error))) from None


def status_of(error) -> int:
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


def failure(url: str, error) -> Exception:
    """Interrupted if another attempt may help; UserError if the object, the bucket or the permission is missing."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError
    from botocore.parsers import ResponseParserError

    if isinstance(error, ClientError) and (status_of(error) in RETRYABLE or status_of(error) > 501):
        return Interrupted(f"{url}: {error}")
    if isinstance(error, (ConnectionError, HTTPClientError, ResponseParserError)):
        return Interrupted(f"{url}: {error}")
    code = error.response.get("Error", {}).get("Code") if isinstance(error, ClientError) else type(error).__name__
    return UserError(f"{url}: {REASONS.get(code, error)}")


def content_range(url: str, header: str) -> tuple[int, int]:
    """(first byte, size of the whole) from "bytes 200-999/1000"."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", header.strip())
    if not match:
        raise Interrupted(f"{url}: a partial answer with Content-Range {header!r}")
    return int(match.group(1)), int(match.group(2))
