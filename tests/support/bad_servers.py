"""Small real servers that misbehave on request: for http, and, in front of moto's, for S3."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import requests

SKIPPED_HEADERS = {"connection", "transfer-encoding", "content-encoding", "server", "date", "keep-alive"}


class Handler(BaseHTTPRequestHandler):
    """Answers each GET as server.answer says, after taking the next fault from server.faults, HEAD and PUT without.

    Faults: "503", "drop" (half of the body, then the connection is cut), "reset" (cut before any answer), None.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        self.answer(self.server.faults.pop(0) if self.server.faults else None)

    def do_HEAD(self):
        self.answer(None)

    def do_PUT(self):
        self.close_connection = True  # the body may not be read to its end
        self.answer(None)

    def answer(self, fault):
        server = self.server
        if fault == "reset":
            self.close_connection = True
            return
        if fault == "503":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status, headers, body = server.answer(self.path, self.headers)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:len(body) // 2] if fault == "drop" else body)
        if fault == "drop" or "Content-Length" not in headers:
            self.close_connection = True

    def log_message(self, *_):
        pass


@contextmanager
def serving(answer, faults=()):
    """Run a server; yields it, with .url, .faults (a list to append to) and .requests (the headers that came)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answer, server.faults, server.requests = answer, list(faults), []
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def file_server(content: bytes, ranges: bool = True, version: str = '"v1"', sized: bool = True):
    """An answer function that serves one file under every path."""

    def answer(_, headers):
        sent = {"ETag": version} if version else {}
        wanted = headers.get("Range")
        if wanted and ranges and headers.get("If-Range", version) == version:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                return 416, {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"}, b""
            sent["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, sent | {"Content-Length": str(len(content) - start)}, content[start:]
        return 200, sent | ({"Content-Length": str(len(content))} if sized else {}), content

    return answer


def proxy_to(upstream: str, ignore_ranges: bool = False):
    """An answer function that passes each GET on to another server."""

    def answer(path, headers):
        passed = {name: value for name, value in headers.items()
                  if name.lower() not in {"host", "range" if ignore_ranges else "host"}}
        answered = requests.get(upstream + path, headers=passed, timeout=10)
        kept = {name: value for name, value in answered.headers.items() if name.lower() not in SKIPPED_HEADERS}
        return answered.status_code, kept, answered.content

    return answer
