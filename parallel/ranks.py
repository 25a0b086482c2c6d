"""The ranks of a run: how they connect, what they exchange on the host, and how they end together.

Gradients go over the device's own backend (hccl, nccl, gloo), torch.distributed's default group.  Values about the run
itself go over a second group, gloo on the host, so that the device is not waited for.
"""

import json
import os
import socket
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from common.errors import UserError, first_line
from common.locks import LONGEST_WAIT
from parallel import elastic, rendezvous
from parallel.rendezvous import RankInfo
from parallel.watchdog import RankWatchdog, missing_ranks

LEAVE_TIMEOUT = timedelta(seconds=10)  # in which the ranks leave one after the other
OWN_STORE_SECONDS = 30  # in which rank 0 must reach the store that it hosts itself


def init_ranks(info: RankInfo, timeout_seconds: int) -> "SingleRank":
    """A context manager of the ranks: they leave the block together, and where one fails, all end.

    `timeout_seconds` is the longest time that a rank waits for another.
    """
    return SingleRank(info) if info.world_size == 1 else RankGroup(info, timedelta(seconds=timeout_seconds))


class SingleRank:
    """The only rank of a run; collectives return its own values."""

    def __init__(self, info: RankInfo):
        self.rank = info.rank
        self.world_size = info.world_size
        self.local_rank = info.local_rank or 0
        self.local_size = info.local_size or 1

    def __enter__(self) -> "SingleRank":
        return self

    def __exit__(self, error_type, error, trace) -> None:
        """End the run, with an error or without."""

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which logs and writes checkpoints."""
        return self.rank == 0

    @property
    def of_this_server(self) -> range:
        """The ranks that share this one's server, as far as the launcher tells."""
        first = self.rank - self.local_rank
        known = self.local_size > 1 and first >= 0 and first % self.local_size == 0
        return range(first, first + self.local_size) if known else range(self.rank, self.rank + 1)

    def warn(self, text: str) -> None:
        """Print a warning, once for all ranks."""
        if self.first:
            print(f"warning: {text}", file=sys.stderr)

    @contextmanager
    def first_holds(self, lock):
        """A block in which rank 0 holds the lock, a context manager, for all ranks: no rank is in it before that."""
        with lock:
            yield

    def connect(self, device) -> None:
        """Connect the ranks, over the device's backend and on the host.  The methods below work from then on."""

    def check_same(self, values: dict) -> None:
        """Check that all ranks have the same values.  UserError names a rank that differs and its first difference."""

    def gather(self, value) -> list:
        """The values (plain Python) of all ranks, in the order of the ranks, on every rank."""
        return [value]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small host tensor over all ranks."""
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.sum(values) / self.world_size

    def start_sum(self, values: torch.Tensor) -> dist.Work | None:
        """Start to replace a small host tensor by its sum over all ranks; wait() on the returned work."""

    def start_maximum(self, values: torch.Tensor) -> dist.Work | None:
        """The same with the maximum."""


class RankGroup(SingleRank):
    """One of several ranks."""

    def __init__(self, info: RankInfo, timeout: timedelta):
        super().__init__(info)
        self.timeout = timeout
        self.address, self.port = rendezvous.master_address(os.environ, info)
        with deadline(timeout, f"rank {self.rank}: {self.address}:{self.port} (MASTER_ADDR, MASTER_PORT) answers, "
                               f"but not as the store of a run does: does another program use that port?"):
            torchrun_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            stores = [self.open_store(host=self.rank == 0 and not torchrun_hosts_store), self.open_store(host=False)]
            if torchrun_hosts_store:
                stores = self.stores_of_this_start(*stores)
            self.store, self.watchdog = stores[0], RankWatchdog(stores[1], self.rank, self.world_size)

    def stores_of_this_start(self, *stores: dist.Store) -> list[dist.Store]:
        """The stores without what ranks of an earlier start have written."""
        try:
            name = elastic.name_of_start(stores[0], self.open_store(host=False) if self.first else None,
                                         self.world_size, self.rank)
        except dist.DistError as error:
            raise UserError(f"rank {self.rank}: rank 0 did not come to {self.address}:{self.port} within "
                            f"{self.timeout} ({first_line(error)})") from None
        return [dist.PrefixStore(name, store) for store in stores]

    def open_store(self, host: bool) -> dist.Store:
        """A connection to the store through which the ranks connect; its host starts it."""
        if not host:
            wait_for_listener(self.rank, self.address, self.port, self.timeout)
        timeout = timedelta(seconds=OWN_STORE_SECONDS) if host else self.timeout
        try:
            store = dist.TCPStore(self.address, self.port, is_master=host, timeout=timeout, wait_for_workers=False)
        except dist.DistError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(f"rank {self.rank}: port {self.port} is in use on this server: set MASTER_PORT to a "
                                f"free one") from None
            raise UserError(f"rank {self.rank}: no store at {self.address}:{self.port}: does MASTER_ADDR name the "
                            f"server of rank 0? ({first_line(error)})") from None
        store.set_timeout(self.timeout)
        return store

    def __exit__(self, error_type, error, trace) -> None:
        """Leave together.  The ranks are watched to the end, because HCCL waits there without a limit."""
        if error is not None:
            self.watchdog.fail(error)
        try:
            dist.barrier(group=self.host_group)  # rank 0 may still be writing
            with deadline(self.timeout, f"rank {self.rank}: the other ranks did not leave the process group"):
                dist.destroy_process_group()
        except RuntimeError as lost_rank:
            self.watchdog.fail(lost_rank)
        self.watchdog.stop()
        self.store.set(f"left/{self.rank}", "")
        if self.first:  # hosts the store, which the watchdogs of the others poll until they stop
            missing_ranks(self.store, "left", list(range(self.world_size)), LEAVE_TIMEOUT)

    @contextmanager
    def first_holds(self, lock):
        if not self.first:
            self.store.wait(["locked"], self.timeout + timedelta(seconds=LONGEST_WAIT))
            yield
            return
        with lock:
            self.store.set("locked", "")
            yield

    def connect(self, device) -> None:
        self.wait_for_all_ranks(device.software())
        device.register_backend()
        try:
            dist.init_process_group(device.backend, store=self.store, timeout=self.timeout, rank=self.rank,
                                    world_size=self.world_size)
            self.host_group = dist.new_group(backend="gloo", timeout=self.timeout)
            probe = torch.ones(1).to(device.torch_device)
            dist.all_reduce(probe)
        except RuntimeError as error:
            raise UserError(f"no connection to the other ranks over {device.backend} (interface "
                            f"{os.environ.get('GLOO_SOCKET_IFNAME')}, see GLOO_SOCKET_IFNAME): {error}") from error
        if probe.item() != self.world_size:
            raise UserError(f"the sum of {self.world_size} ones over {device.backend} on {device.torch_device.type} "
                            f"is {probe.item():g}: this device cannot train on several ranks")

    def wait_for_all_ranks(self, software: dict[str, str]) -> None:
        """Wait until all ranks are connected to the store, and compare their software.

        UserError names the ranks that are missing, or one that differs.  This comes before the backend is used: ranks
        in different modes or releases would wait for each other without end.
        """
        self.store.set(f"connected/{self.rank}", json.dumps(software))
        if self.first:
            missing = missing_ranks(self.store, "connected", list(range(self.world_size)), self.timeout)
            if missing:
                raise UserError(f"rank {', '.join(map(str, missing))} did not connect within {self.timeout}: it died, "
                                f"or cannot reach {self.address}:{self.port}")
            for rank in range(1, self.world_size):
                difference = difference_from_rank_0(json.loads(self.store.get(f"connected/{rank}")), software)
                if difference:
                    raise UserError(f"rank {rank} and rank 0 differ: {difference}")
            self.store.set(elastic.ALL_CONNECTED, "")
        self.store.get(elastic.ALL_CONNECTED)

    def check_same(self, values: dict) -> None:
        of_rank_0 = [values]
        dist.broadcast_object_list(of_rank_0, src=0, group=self.host_group)
        differences = self.gather(difference_from_rank_0(values, of_rank_0[0]))
        for rank, difference in enumerate(differences):
            if difference:
                raise UserError(f"rank {rank} and rank 0 differ: {difference}")

    def gather(self, value) -> list:
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total, group=self.host_group)
        return total

    def start_sum(self, values: torch.Tensor) -> dist.Work | None:
        return dist.all_reduce(values, group=self.host_group, async_op=True)

    def start_maximum(self, values: torch.Tensor) -> dist.Work | None:
        return dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True)


def wait_for_listener(rank: int, address: str, port: int, timeout: timedelta) -> None:
    """Wait until a program listens at address:port.  UserError where it cannot be reached, or not in time."""
    where = f"rank {rank}: {address}:{port} (MASTER_ADDR, MASTER_PORT)"
    give_up = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except (ConnectionError, TimeoutError) as error:  # perhaps not started yet
            if time.monotonic() > give_up:
                raise UserError(f"{where} did not answer within {timeout}: {error}") from None
        except OSError as error:  # an unknown name, no route
            raise UserError(f"{where} cannot be reached from {socket.gethostname()}: {error}") from None
        time.sleep(0.2)


def difference_from_rank_0(own: dict, of_rank_0: dict) -> str | None:
    """The first value in which this rank and rank 0 differ, in words; None where they agree."""
    for name in {**of_rank_0, **own}:
        here, there = own.get(name, "nothing"), of_rank_0.get(name, "nothing")
        if here != there:
            return f"{name} is {here}, on rank 0 {there}"
    return None


@contextmanager
def deadline(timeout: timedelta, text: str):
    """End this process with the error `text` if the block takes too long: for calls without a time-out."""
    def end() -> None:
        print(f"{sys.argv[0]}: error: {text}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout.total_seconds() + 2 * OWN_STORE_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
