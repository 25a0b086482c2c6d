"""A link to a server with a latency and a rate for each connection, that can be cut: a TCP proxy in threads."""

import socket
import threading
import time
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

BLOCK = 1 << 16


class ShapedLink:
    """`latency` seconds before the answer to a request; `rate` bytes a second and connection, `total_rate` of all
    together, None = as they come.

    While `away` is set, connections are cut, and new ones end at once.  `received` counts the bytes of the answers.
    """

    def __init__(self, upstream: str, latency: float, rate: float | None, total_rate: float | None):
        parts = urlsplit(upstream)
        self.upstream, self.latency, self.rate = (parts.hostname, parts.port), latency, rate
        self.total_rate, self.all_due = total_rate, 0.0
        self.away, self.guard, self.received, self.pairs = threading.Event(), threading.Lock(), 0, set()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        if self.away.is_set():
            client.close()
            return
        with client, socket.create_connection(self.upstream) as server:
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.guard:
                self.pairs.add((client, server))
            answers = threading.Thread(target=self.pump_answers, args=(server, client), daemon=True)
            answers.start()
            with suppress(OSError):
                while (block := client.recv(BLOCK)) and not self.away.is_set():
                    time.sleep(self.latency * block.startswith((b"GET", b"HEAD", b"PUT", b"POST", b"DELETE")))
                    server.sendall(block)
            for side in (client, server):
                with suppress(OSError):
                    side.shutdown(socket.SHUT_RDWR)
            answers.join()
            with self.guard:
                self.pairs.discard((client, server))

    def pump_answers(self, server: socket.socket, client: socket.socket) -> None:
        due = time.monotonic()
        size = BLOCK if not self.total_rate else max(1024, min(BLOCK, int(self.total_rate / 50)))
        with suppress(OSError):
            while block := server.recv(size):
                with self.guard:
                    self.received += len(block)
                    if self.total_rate:
                        self.all_due = max(self.all_due, time.monotonic()) + len(block) / self.total_rate
                time.sleep(max(0.0, self.all_due - time.monotonic()) if self.total_rate else 0.0)
                if self.rate:
                    due = max(due, time.monotonic() - BLOCK / self.rate) + len(block) / self.rate
                    time.sleep(max(0.0, due - time.monotonic()))
                client.sendall(block)

    def cut(self) -> None:
        """Be away from now on, until `away` is cleared."""
        self.away.set()
        with self.guard:
            for pair in self.pairs:
                for side in pair:
                    with suppress(OSError):
                        side.shutdown(socket.SHUT_RDWR)


@contextmanager
def shaped_link(upstream: str, latency: float = 0.0, rate: float | None = None, total_rate: float | None = None):
    link = ShapedLink(upstream, latency, rate, total_rate)
    try:
        yield link
    finally:
        link.listener.close()
        link.cut()
