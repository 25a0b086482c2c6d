"""Fetches the remote shards that a stream of batches will read, several at a time and in the order of need.  No torch.

A shard is fetched when there is room for it beside those that are needed sooner (shard_cache.py).
"""

import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from common.cli import format_bytes, times_to_tell
from common.errors import UserError
from common.object_store import Cancelled
from data.shard_cache import Fetching, NoRoom, RemoteShard, bytes_here, fetch_shard, local_copy

FILES_AT_ONCE = 4


def to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class ShardFetcher:
    """The fetching of one process; `warn` hears of outages, from any of its threads.

    Of a long wait every process tells on stderr: ranks may wait for different shards.
    """

    def __init__(self, warn: Callable[[str], None] = to_stderr):
        self.warn = warn
        self.pool = ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="shard-fetcher")
        self.stop = threading.Event()
        self.guard = threading.Lock()
        self.order: dict[Path, RemoteShard] = {}  # what is needed, the next one first
        self.in_use: list[Path] = []
        self.running: set[Path] = set()
        self.failed: set[Path] = set()  # whose turn tells why
        self.full = False

    def expect(self, shards: Iterable, in_use: Iterable = ()) -> None:
        """These shards will be needed, in this order; those `in_use` may be, by ranks that are behind.

        Local ones are passed over.
        """
        with self.guard:
            self.in_use = [shard.path for shard in in_use if shard.remote]
            self.order = {shard.path: shard.remote for shard in shards if shard.remote}
            self.full = False
        self.start_next()

    def start_next(self) -> None:
        """Start to fetch what is needed next, as far as there are threads and room."""
        with self.guard:
            for path, remote in self.order.items():
                if self.full or self.stop.is_set() or len(self.running) >= FILES_AT_ONCE:
                    return
                if path not in self.running | self.failed and not path.exists():
                    self.running.add(path)
                    self.pool.submit(self.fetch, remote, path)

    def fetch(self, remote: RemoteShard, path: Path) -> None:
        try:
            fetch_shard(remote, path, self.fetching())
        except NoRoom:
            self.full = True  # until the order of need has moved on
        except Cancelled:
            return
        except (UserError, OSError):
            self.failed.add(path)
        finally:
            with self.guard:
                self.running.discard(path)
        self.start_next()

    def fetching(self, first: Path | None = None) -> Fetching:
        """For a shard that is needed now, `first`: room for it may be made of all others."""
        needed = [*([first] if first else []), *self.in_use, *self.order]
        return Fetching(list(dict.fromkeys(needed)), self.warn, self.stop)

    def wait_for(self, shard) -> None:
        """Until a shard is here.  UserError where it cannot be had, Cancelled after close()."""
        if shard.remote:
            with told_of(shard.remote, shard.path), \
                    local_copy(shard.remote, shard.path, self.fetching(shard.path)):
                self.failed.discard(shard.path)

    def close(self) -> None:
        self.stop.set()
        self.pool.shutdown(cancel_futures=True)


@contextmanager
def told_of(remote: RemoteShard, path: Path):
    """A block that waits for a shard; where that takes long, stderr tells how much of it is here."""
    done = threading.Event()

    def tell() -> None:
        for pause, total in times_to_tell():
            if done.wait(pause):
                return
            here = format_bytes(bytes_here(path))
            to_stderr(f"waiting for {remote.url}: {here} of {format_bytes(remote.nbytes)} are here after {total:.0f} s")

    threading.Thread(target=tell, name=f"waits for {remote.name}", daemon=True).start()
    try:
        yield
    finally:
        done.set()
