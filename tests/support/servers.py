"""Servers on this machine: network namespaces joined by a switch, each with an address and an sshd of its own.

They share this machine's files and cores.  It takes root, iproute2 and openssh-server, and a container that may make
namespaces.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

SSH_PORT = 3022
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
SSHD_CONFIG = """Port {port}
HostKey {key}
AuthorizedKeysFile {key}.pub
StrictModes no
UsePAM no
PidFile none
"""


def problem() -> str | None:
    """Why there can be no servers here, or None."""
    missing = [name for name in ("ip", "ssh", "ssh-keygen") if shutil.which(name) is None] + ["sshd"] * (SSHD is None)
    if missing:
        return f"no {', '.join(missing)} here (apt-get install openssh-server iproute2)"
    if os.geteuid() != 0:
        return "network namespaces want root"
    name = f"try{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], text=True, capture_output=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


class Servers:
    """`addresses` of so many servers; `ssh_options` reach each from each as root."""

    def __init__(self, count: int, folder: Path):
        self.count = count
        self.folder = folder
        self.addresses = [f"10.10.100.{101 + server}" for server in range(count)]
        self.ssh_options = (f"-p {SSH_PORT} -i {folder}/key -o BatchMode=yes -o LogLevel=ERROR "
                            f"-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null")

    def name(self, server) -> str:
        return f"bert{os.getpid()}_{server}"

    def inside(self, server, *command) -> list[str]:
        """A command as it runs on a server, counted from 0."""
        return ["ip", "netns", "exec", self.name(server), *map(str, command)]

    def connect(self) -> None:
        """Give each server a cable to the switch, and an address."""
        switch = self.name("switch")
        ip("link", "add", "switch", "type", "bridge", inside=switch)
        ip("link", "set", "switch", "up", inside=switch)
        for server, address in enumerate(self.addresses):
            port = f"port{server}"
            ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", self.name(server), inside=switch)
            ip("link", "set", port, "master", "switch", "up", inside=switch)
            ip("address", "add", f"{address}/16", "dev", "eth0", inside=self.name(server))
            for interface in ("eth0", "lo"):
                ip("link", "set", interface, "up", inside=self.name(server))

    def received(self, server) -> int:
        """Bytes that came over the network to a server."""
        counter = subprocess.run(self.inside(server, "cat", "/sys/class/net/eth0/statistics/rx_bytes"), check=True,
                                 capture_output=True)
        return int(counter.stdout)

    def wait_for_ssh(self, server) -> None:
        give_up = time.monotonic() + 30
        command = self.inside(server, "ssh", *self.ssh_options.split(), self.addresses[server], "true")
        while (tried := subprocess.run(command, text=True, capture_output=True)).returncode:
            assert time.monotonic() < give_up, f"no ssh to {self.addresses[server]}: {tried.stderr}"
            time.sleep(0.2)


def ip(*words: str, inside: str) -> None:
    subprocess.run(["ip", "-netns", inside, *words], check=True)


@contextmanager
def running(count: int, folder: Path):
    """Servers while the block runs.  Whatever still runs on them at its end is killed."""
    servers = Servers(count, folder)
    with ExitStack() as stack:
        for name in (*range(count), "switch"):
            stack.enter_context(namespace(servers.name(name)))
        servers.connect()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(port=SSH_PORT, key=folder / "key"))
        Path("/run/sshd").mkdir(exist_ok=True)  # without it sshd does not start
        for server in range(count):
            log = stack.enter_context(open(folder / f"sshd_{server}.txt", "w"))
            sshd = subprocess.Popen(servers.inside(server, SSHD, "-D", "-e", "-f", folder / "sshd_config"), stderr=log)
            stack.callback(sshd.wait)
            stack.callback(sshd.kill)
        for server in range(count):
            servers.wait_for_ssh(server)
        yield servers


@contextmanager
def namespace(name: str):
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield
    finally:
        left = subprocess.run(["ip", "netns", "pids", name], check=True, capture_output=True).stdout.split()
        for process in map(int, left):
            os.kill(process, signal.SIGKILL)
        subprocess.run(["ip", "netns", "delete", name], check=True)
