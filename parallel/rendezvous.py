"""Which of how many processes this one is, and where they meet: the environment that a launcher leaves behind.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; Open MPI's mpirun sets OMPI_COMM_WORLD_*; behind any other MPI launcher
mpi4py is asked.  No torch here.
"""

import fcntl
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import UserError

DEFAULT_ADDRESS, DEFAULT_PORT = "localhost", 12345
OTHER_MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK")  # set by MPICH, Intel MPI and srun: an MPI launcher, but not Open MPI's
GET_INTERFACE_ADDRESS = 0x8915  # Linux, SIOCGIFADDR


@dataclass(frozen=True)
class Place:
    """The place of a process: `rank` of `world_size` in all, `local_rank` of `local_size` on its server."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int | None = None  # None where the launcher does not tell


def find_place(environment: Mapping[str, str], local_rank: int | None = None) -> Place:
    """The place of this process.  `local_rank`, where given (--local_rank), goes before the environment's.

        >>> find_place({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"})
        Place(rank=9, world_size=16, local_rank=1, local_size=None)
    """
    own_card = local_rank is not None and local_rank >= 0
    if "RANK" in environment or "WORLD_SIZE" in environment:
        place = place_from(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if place.world_size > 1 and "LOCAL_RANK" not in environment and not own_card:
            raise UserError(f"WORLD_SIZE is {place.world_size}, but neither LOCAL_RANK nor --local_rank says which "
                            f"card of its server is this rank's")
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        place = place_from(environment, *(f"OMPI_COMM_WORLD_{name}"
                                          for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    elif any(name in environment for name in OTHER_MPI_VARIABLES):
        place = place_in_mpi()
    else:
        place = Place()
    return Place(place.rank, place.world_size, local_rank if own_card else place.local_rank, place.local_size)


def place_from(environment: Mapping[str, str], rank: str, world_size: str, local_rank: str, local_size: str) -> Place:
    """The place that four variables with these names tell; UserError names the one that is missing or impossible."""
    for given, absent in ((world_size, rank), (rank, world_size)):
        if absent not in environment:
            raise UserError(f"{given} is {environment[given]}, but {absent} is not set: the launcher sets both")
    place = Place(number(environment, rank), number(environment, world_size), number(environment, local_rank, "0"),
                  number(environment, local_size) if local_size in environment else None)
    if place.world_size < 1 or not 0 <= place.rank < place.world_size:
        raise UserError(f"{rank} is {place.rank} and {world_size} is {place.world_size}: ranks count from 0")
    return place


def number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, not a whole number") from None


def place_in_mpi() -> Place:
    """The place in MPI_COMM_WORLD: behind a launcher whose variables are not known here."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"started by an MPI launcher other than Open MPI's, so mpi4py has to tell the rank, "
                        f"but it cannot be loaded: {error}") from None
    world = MPI.COMM_WORLD
    server = world.Split_type(MPI.COMM_TYPE_SHARED)
    return Place(world.Get_rank(), world.Get_size(), server.Get_rank(), server.Get_size())


def meeting_point(environment: Mapping[str, str], place: Place) -> tuple[str, int]:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT, on one server localhost:12345 where they are not set."""
    if "MASTER_ADDR" not in environment and place.local_size not in (None, place.world_size):
        raise UserError(f"{place.local_size} of {place.world_size} ranks are on this server, so MASTER_ADDR must name "
                        f"the server of rank 0 (with mpirun: -x MASTER_ADDR -x MASTER_PORT)")
    port = number(environment, "MASTER_PORT", str(DEFAULT_PORT))
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT is {port}, not from 1 to {2**16 - 1}")
    return environment.get("MASTER_ADDR", DEFAULT_ADDRESS), port


def variables(place: Place, address: str, port: int) -> dict[str, str]:
    """The place under the names that communication libraries (HCCL, NCCL) look for, whatever the launcher."""
    return {"RANK": str(place.rank), "WORLD_SIZE": str(place.world_size), "LOCAL_RANK": str(place.local_rank),
            "MASTER_ADDR": address, "MASTER_PORT": str(port)}


def interface_towards(address: str, port: int) -> str | None:
    """The network interface from which `address` is reached (IPv4), or None where it cannot be told.

    Gloo would take the interface that the server's own name resolves to, often loopback, which no other server reaches.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, port))  # a datagram socket: chooses a route, sends nothing
            own_address = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if address_of(name) == own_address), None)


def address_of(interface: str) -> str | None:
    """The IPv4 address of a network interface; None where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            reply = fcntl.ioctl(any_socket, GET_INTERFACE_ADDRESS, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])
