"""Rank, number of ranks and master address, from the environment that a launcher sets.  No torch here.

torchrun sets RANK, WORLD_SIZE and LOCAL_RANK; Open MPI's mpirun sets OMPI_COMM_WORLD_*; Slurm's srun sets SLURM_*;
under any other MPI launcher, mpi4py tells the rank.  All this is read before torch is imported, because Gaudi's
software, which that import may load, fills in what is missing: localhost for MASTER_ADDR, and the card.
"""

import fcntl
import re
import socket
import struct
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

from common.errors import UserError

OTHER_MPI_VARIABLES = ("PMI_SIZE", "PMIX_RANK")  # set by MPICH, Intel MPI and srun: an MPI launcher, but not Open MPI's
STEP_TASKS = "SLURM_STEP_NUM_TASKS"  # srun's; SLURM_NTASKS is also in a batch script and in a shell of salloc
TASKS = ("PMI_SIZE", STEP_TASKS, "SLURM_NTASKS")  # beside these, the number of processes; the first counts
FIRST_SERVER = re.compile(r"(?:[^\s,\[\]]|\[\d[^\[\]]*\])+")
TASKS_OF_SERVERS = re.compile(r"(\d+)(?:\(x(\d+)\))?")
SLURM_PORT, SLURM_PORTS = 10000, 20000  # below those that Linux gives to connections, from 32768 on
PORTS_BETWEEN_STEPS = 997  # steps of one job may run side by side on one server
LOOPBACK = "lo"
SIOCGIFADDR = 0x8915  # Linux: the request for an interface's address


@dataclass(frozen=True)
class RankInfo:
    """Process `rank` of `world_size`, which is `local_rank` of `local_size` on its server."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None  # None where nothing says which card is this rank's
    local_size: int | None = None  # None where the launcher does not set it


def rank_info(environment: Mapping[str, str], local_rank: int | None = None) -> RankInfo:
    """The rank of this process.  `local_rank` (--local_rank), unless None or negative, overrides the environment's.

        >>> rank_info({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"})
        RankInfo(rank=9, world_size=16, local_rank=1, local_size=None)
    """
    given = local_rank is not None and local_rank >= 0
    if "RANK" in environment or "WORLD_SIZE" in environment:
        info = info_from_variables(environment, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if info.world_size > 1 and "LOCAL_RANK" not in environment and not given:
            raise UserError(f"WORLD_SIZE is {info.world_size}, but neither LOCAL_RANK nor --local_rank says which "
                            f"card of its server is this rank's")
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        info = info_from_variables(environment, *(f"OMPI_COMM_WORLD_{name}"
                                                  for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")))
    elif is_slurm_task(environment):
        info = info_from_slurm(environment)
    elif any(name in environment for name in OTHER_MPI_VARIABLES) and tasks(environment) != 1:
        info = info_from_mpi()
    else:
        info = RankInfo()
    return replace(info, local_rank=local_rank) if given else info


def tasks(environment: Mapping[str, str]) -> int | None:
    """The number of processes that PMI or Slurm has started; None where neither says."""
    return next((integer(environment, name) for name in TASKS if name in environment), None)


def info_from_variables(environment: Mapping[str, str], rank: str, world_size: str, local_rank: str,
                        local_size: str) -> RankInfo:
    """From the variables with these names.  UserError names the one that is missing or impossible."""
    for given, absent in ((world_size, rank), (rank, world_size)):
        if absent not in environment:
            raise UserError(f"{given} is {environment[given]}, but {absent} is not set: the launcher sets both")
    info = RankInfo(integer(environment, rank), integer(environment, world_size),
                    integer(environment, local_rank) if local_rank in environment else None,
                    integer(environment, local_size) if local_size in environment else None)
    if info.world_size < 1 or not 0 <= info.rank < info.world_size:
        raise UserError(f"{rank} is {info.rank} and {world_size} is {info.world_size}: ranks count from 0")
    return info


def integer(environment: Mapping[str, str], name: str, default: str = "") -> int:
    text = environment.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name} is {text!r}, not a whole number") from None


def is_slurm_task(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several tasks of srun, and no process that another launcher has started in one."""
    count, rank = environment.get(STEP_TASKS), environment.get("SLURM_PROCID")
    return (rank is not None and count not in (None, "1") and environment.get("PMI_SIZE", count) == count
            and all(environment.get(name, rank) == rank for name in ("PMI_RANK", "PMIX_RANK"))
            and not any(name in environment for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")))


def info_from_slurm(environment: Mapping[str, str]) -> RankInfo:
    """Of a task of srun."""
    info = info_from_variables(environment, "SLURM_PROCID", STEP_TASKS, "SLURM_LOCALID", "")
    return replace(info, local_size=slurm_tasks_here(environment))


def slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
    """The tasks of the step on this server; None where Slurm does not say.

        >>> slurm_tasks_here({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4", "SLURM_NODEID": "2"})
        4
    """
    counts = [int(count) for count, times in TASKS_OF_SERVERS.findall(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
              for _ in range(int(times or 1))]
    server = integer(environment, "SLURM_NODEID", "0")
    return counts[server] if 0 <= server < len(counts) else None


def slurm_address(environment: Mapping[str, str]) -> str:
    """The server of task 0, the first in the list of the step's servers.

        >>> slurm_address({"SLURM_STEP_NODELIST": "rack[03-05,07]-gpu[1-8],login1"})
        'rack03-gpu1'
    """
    servers = environment.get("SLURM_STEP_NODELIST", "")
    first = FIRST_SERVER.match(servers)
    if not first or servers[first.end():first.end() + 1] not in ("", ","):
        raise UserError(f"SLURM_STEP_NODELIST is {servers!r}, not a list of servers: set MASTER_ADDR to that of rank 0")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def slurm_port(environment: Mapping[str, str]) -> int:
    """A port of this step: that of another job on the same servers, or of another step of this job, is another.

        >>> slurm_port({"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"})
        14711
    """
    job, step = (integer(environment, name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return SLURM_PORT + (job + PORTS_BETWEEN_STEPS * step) % SLURM_PORTS


def torchrun_restarts(environment: Mapping[str, str]) -> bool:
    """Whether torchrun starts the ranks again where one fails or servers come and go (--max_restarts above 0)."""
    return integer(environment, "TORCHELASTIC_MAX_RESTARTS", "0") > 0


def info_from_mpi() -> RankInfo:
    """From MPI_COMM_WORLD, under a launcher whose variables are not known here."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"started by an MPI launcher other than Open MPI's, so the rank is read through mpi4py, "
                        f"but it cannot be loaded: {error}") from None
    world = MPI.COMM_WORLD
    server = world.Split_type(MPI.COMM_TYPE_SHARED)
    return RankInfo(world.Get_rank(), world.Get_size(), server.Get_rank(), server.Get_size())


def master_address(environment: Mapping[str, str], info: RankInfo) -> tuple[str, int]:
    """MASTER_ADDR and MASTER_PORT.

    Their defaults are localhost and 12345 on one server; under srun the server of rank 0 and a port of the job.
    """
    several_servers, by_slurm = info.local_size not in (None, info.world_size), is_slurm_task(environment)
    if not environment.get("MASTER_ADDR") and several_servers and not by_slurm:
        raise UserError(f"{info.local_size} of {info.world_size} ranks are on this server, so MASTER_ADDR must name "
                        f"the server of rank 0 (with mpirun: -x MASTER_ADDR -x MASTER_PORT)")
    port = integer(environment, "MASTER_PORT", str(slurm_port(environment) if by_slurm else 12345))
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT is {port}, not from 1 to {2**16 - 1}")
    address = environment.get("MASTER_ADDR") or (slurm_address(environment) if by_slurm and several_servers
                                                 else "localhost")
    return address, port


def set_variables(info: RankInfo, environment: MutableMapping[str, str]) -> None:
    """Set what HCCL, NCCL and Gloo read and not every launcher sets; nothing for a single rank."""
    if info.world_size == 1:
        return
    address, port = master_address(environment, info)
    environment.update(RANK=str(info.rank), WORLD_SIZE=str(info.world_size), LOCAL_RANK=str(info.local_rank or 0),
                       MASTER_ADDR=address, MASTER_PORT=str(port))
    interface = interface_to(address, port)
    if interface:
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    several_servers = interface != LOOPBACK and info.local_size != info.world_size
    if several_servers and "GLOO_SOCKET_IFNAME" in environment:
        environment.setdefault("HCCL_SOCKET_IFNAME", environment["GLOO_SOCKET_IFNAME"])


def interface_to(address: str, port: int) -> str | None:
    """The network interface from which `address` is reached (IPv4), or None where it cannot be determined.

    Gloo's default is the interface that the server's own name resolves to, often loopback, which other servers cannot
    reach.
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
            reply = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])
