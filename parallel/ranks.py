"""The ranks of a run: how they meet, what they do together on the host, and how they part.

    with distributed.join(args) as process:
        …                                    # what needs only the rank
        process.connect(device)              # from here on the ranks can speak to each other
        process.check_same(facts)

Gradients go over the device's own backend (hccl, nccl, gloo), torch.distributed's default group.  What ranks have to
tell each other about the run goes over a second group, gloo on the host, so that no device is waited for.
"""

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
from parallel import rendezvous as launch
from parallel.rendezvous import Place
from parallel.watchdog import Lifeline

OWN_STORE_SECONDS = 30  # in which rank 0 must reach the store that it keeps itself


def join(args) -> "Process":
    """This process's place in the run, as a block: the ranks leave it together, or, where one fails, end together."""
    place = launch.find_place(os.environ, args.local_rank)
    return Process(place) if place.world_size == 1 else Member(place, timedelta(seconds=args.collective_timeout))


class Process:
    """The only process of a run: what ranks do together, it does alone."""

    def __init__(self, place: Place):
        self.rank = place.rank
        self.world_size = place.world_size
        self.local_rank = place.local_rank
        self.local_size = place.local_size or 1

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """The run is over, well or not."""

    @property
    def first(self) -> bool:
        """Whether this is the process that logs and writes checkpoints."""
        return self.rank == 0

    def warn(self, text: str) -> None:
        """Tell the user, once for all ranks."""
        if self.first:
            print(f"warning: {text}", file=sys.stderr)

    def connect(self, device) -> None:
        """Let the ranks speak to each other."""

    def check_same(self, facts: dict) -> None:
        """Check that all ranks have the same facts.  UserError names the rank and the first that differs."""

    def gather(self, value) -> list:
        """The values of all ranks (plain Python values), in the order of the ranks, on every rank."""
        return [value]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a small host tensor over all ranks."""
        return values

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.sum(values) / self.world_size

    def start_maximum(self, values: torch.Tensor) -> dist.Work | None:
        """Begin to replace a small host tensor by its maximum over all ranks; wait() on what is returned ends it."""


class Member(Process):
    """One of several ranks."""

    def __init__(self, place: Place, timeout: timedelta):
        super().__init__(place)
        self.timeout = timeout
        self.address, self.port = launch.meeting_point(os.environ, place)
        os.environ.update(launch.variables(place, self.address, self.port))
        interface = launch.interface_towards(self.address, self.port)
        if interface:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        with deadline(timeout, f"rank {self.rank}: {self.address}:{self.port} (MASTER_ADDR, MASTER_PORT) answers, "
                               f"but not as the store of a run does: does another program use that port?"):
            self.store = self.open_store(keeper=self.rank == 0 and not kept_by_torchrun())
            self.lifeline = Lifeline(self.open_store(keeper=False), self.rank, self.world_size)

    def open_store(self, keeper: bool) -> dist.Store:
        """A connection to the store in which the ranks meet; its keeper starts it."""
        if not keeper:
            wait_for_listener(self.rank, self.address, self.port, self.timeout)
        timeout = timedelta(seconds=OWN_STORE_SECONDS) if keeper else self.timeout
        try:
            store = dist.TCPStore(self.address, self.port, is_master=keeper, timeout=timeout, wait_for_workers=False)
        except dist.DistError as error:
            raise UserError(self.store_problem(error)) from None
        store.set_timeout(self.timeout)
        return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)

    def store_problem(self, error: dist.DistError) -> str:
        if "EADDRINUSE" in str(error):
            return f"rank {self.rank}: port {self.port} is in use on this server: name a free one in MASTER_PORT"
        return (f"rank {self.rank}: no store at {self.address}:{self.port}: does MASTER_ADDR name the server of "
                f"rank 0? ({first_line(error)})")

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self.lifeline.fail(error)
        self.lifeline.release()
        try:
            dist.barrier(group=self.host_group)  # rank 0 may still be writing: if it fails, all end with that
        except RuntimeError as lost:
            self.lifeline.fail(lost)
        dist.destroy_process_group()

    def connect(self, device) -> None:
        self.call_the_roll()
        device.register_backend()
        place = {"rank": self.rank, "world_size": self.world_size}
        try:
            dist.init_process_group(device.backend, store=self.store, timeout=self.timeout, **place)
            self.host_group = dist.new_group(backend="gloo", timeout=self.timeout)
            probe = torch.ones(1).to(device.torch_device)
            dist.all_reduce(probe)
        except RuntimeError as error:
            raise UserError(f"no connection to the other ranks over {device.backend} (interface "
                            f"{os.environ.get('GLOO_SOCKET_IFNAME')}, see GLOO_SOCKET_IFNAME): {error}") from error
        if probe.item() != self.world_size:
            raise UserError(f"the sum of {self.world_size} ones over {device.backend} on "
                            f"{device.kind} is {probe.item():g}: this device cannot train on several ranks")

    def call_the_roll(self) -> None:
        """Wait until all ranks are here.  UserError names those that are not."""
        self.store.set(f"here/{self.rank}", "")
        if self.first:
            missing = list(range(self.world_size))
            give_up = time.monotonic() + self.timeout.total_seconds()
            while missing := [rank for rank in missing if not self.store.check([f"here/{rank}"])]:
                if time.monotonic() > give_up:
                    raise UserError(f"rank {', '.join(map(str, missing))} did not come within {self.timeout}: died, or "
                                    f"cannot reach {self.address}:{self.port}")
                time.sleep(0.05)
            self.store.set("all here", "")
        self.store.get("all here")

    def check_same(self, facts: dict) -> None:
        first_facts = [facts]
        dist.broadcast_object_list(first_facts, src=0, group=self.host_group)
        differences = self.gather(first_difference(facts, first_facts[0]))
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

    def start_maximum(self, values: torch.Tensor) -> dist.Work | None:
        return dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.host_group, async_op=True)


def kept_by_torchrun() -> bool:
    """Whether the launcher keeps the store at MASTER_ADDR:MASTER_PORT, and no rank has to."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def wait_for_listener(rank: int, address: str, port: int, timeout: timedelta) -> None:
    """Wait until somebody listens at address:port.  UserError where it cannot be reached at all, or not in time."""
    where = f"rank {rank}: {address}:{port} (MASTER_ADDR, MASTER_PORT)"
    give_up = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return
        except (ConnectionError, TimeoutError) as error:  # not there yet, perhaps
            if time.monotonic() > give_up:
                raise UserError(f"{where} did not answer within {timeout}: {error}") from None
        except OSError as error:  # an unknown name, no route
            raise UserError(f"{where} cannot be reached from {socket.gethostname()}: {error}") from None
        time.sleep(0.2)


def first_difference(facts: dict, first_facts: dict) -> str | None:
    """The first fact in which this rank and rank 0 differ, in words, or None."""
    for name in {**first_facts, **facts}:
        own, first = (some.get(name, "nothing") for some in (facts, first_facts))
        if own != first:
            return f"{name} is {own}, on rank 0 {first}"
    return None


@contextmanager
def deadline(timeout: timedelta, text: str):
    """End this process with `text` where the block takes too long: for calls that keep no time-out themselves."""
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
