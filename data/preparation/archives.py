"""Unpacks archives into a folder, and never outside it."""

import io
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from common.download import is_remote
from common.errors import UserError
from common.files import replacing
from common.remote_sources import Interrupted, remote_source

ENDINGS = (".zip", ".whl", ".tar", ".gz", ".tgz", ".bz2", ".xz")
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)


def unpack(archive, folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """Unpack a .zip or .tar(.gz, .bz2, .xz), all files or those wanted, below `folder`; returns their paths."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                return unpack_zip(archive, file, folder, wanted)
        with tarfile.open(archive) as file:
            members = {info.name: info for info in file if not info.isdir()}
            special = [name for name, info in members.items() if not info.isreg()]
            return write_members(archive, folder, members, special, wanted, file.extractfile)
    except BROKEN as error:
        raise UserError(f"{archive}: no readable archive ({error})") from None
    except OSError as error:
        raise UserError(f"{archive}: {error}") from None


def unpack_remote(archive: str, folder: Path, wanted: list[str]) -> list[Path]:
    """Unpack some files of a .zip that may be remote, downloading little more than these files.

    Raises Interrupted if the server does not support range requests, or fails.
    """
    if not is_remote(archive):
        return unpack(archive, folder, wanted)
    try:
        with zipfile.ZipFile(io.BufferedReader(RemoteFile(archive), 1 << 16)) as file:
            return unpack_zip(archive, file, folder, wanted)
    except BROKEN as error:
        raise UserError(f"{archive}: no readable archive ({error})") from None


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable stream.  Sequential reads use one response; others request a range."""

    def __init__(self, url: str):
        self.source, self.position, self.served = remote_source(url), 0, -1
        self.rest, self.blocks = b"", iter(())
        self.size = self.ask(0).size

    def ask(self, offset: int):
        reply = self.source.open(offset)
        if reply.start != offset or reply.size is None:
            raise Interrupted(f"{self.source.url}: the server does not support range requests")
        return reply

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        if self.position >= self.size:
            return 0
        if self.position != self.served:
            self.blocks, self.rest, self.served = self.ask(self.position).blocks, b"", self.position
        if not self.rest:
            self.rest = next(self.blocks, b"")
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        self.position = self.served = self.position + count
        return count


def unpack_zip(archive, file: zipfile.ZipFile, folder: Path, wanted) -> list[Path]:
    members = {info.filename: info for info in file.infolist() if not info.is_dir()}
    links = [name for name, info in members.items() if stat.S_ISLNK(info.external_attr >> 16)]
    return write_members(archive, folder, members, links, wanted, file.open)


def write_members(archive, folder: Path, members: dict, special: list[str], wanted, open_member) -> list[Path]:
    """Write the members, or those wanted, below `folder`.

    UserError, before anything is written, if a member would leave the folder or is `special` (a link or a device).
    """
    for name in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or name in special:
            raise UserError(f"{archive}: {name!r} would leave the folder, or is no regular file; nothing was unpacked")
    wanted = list(members) if wanted is None else wanted
    missing = [name for name in wanted if name not in members]
    if missing:
        raise UserError(f"{archive}: no {', '.join(missing)} in it")
    for name in wanted:
        with replacing(folder / name) as temporary, open_member(members[name]) as packed, open(temporary, "wb") as file:
            shutil.copyfileobj(packed, file)
    return [folder / name for name in wanted]
