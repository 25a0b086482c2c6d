"""Unpacks archives into a folder, and never outside it; and reads compressed files, known by their first bytes."""

import bz2
import gzip
import io
import lzma
import re
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
from common.text import encoding_of

# The first bytes of a file tell what it is, whatever its name: dump.xml.bz2.1 is compressed too.  And the usual ending:
COMPRESSED = {b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
NOT_READ = {b"PK\x03\x04": "a zip archive: unpack it (unzip)", b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it (7z e)"}
HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html[\s>])",
                  re.IGNORECASE | re.DOTALL)
START = 4096  # bytes in which a page says that it is HTML
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error)
BROKEN = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError)


def first_bytes(path) -> bytes:
    with open(path, "rb") as file:
        return file.read(START)


def compression(path) -> str | None:
    """The usual ending of a compressed file, by its first bytes; None for any other file."""
    start = first_bytes(path)
    return next((ending for magic, ending in COMPRESSED.items() if start.startswith(magic)), None)


def is_archive(path) -> bool:
    return zipfile.is_zipfile(path) or tarfile.is_tarfile(path)


def is_html(start: bytes) -> bool:
    return bool(HTML.match(start[:START]))


def refuse_other_content(path) -> None:
    """UserError, which says what it is, for a file that is neither XML nor compressed XML."""
    start = first_bytes(path)
    if is_html(start):
        raise UserError(f"{path}: an HTML page, as servers send in place of a file that they do not have: "
                        "download it again")
    for magic, what in NOT_READ.items():
        if start.startswith(magic):
            raise UserError(f"{path}: {what}, and name what comes out")
    if encoding_of(start).startswith(("utf-16", "utf-32")):
        raise UserError(f"{path}: {encoding_of(start).upper()}, but a dump is UTF-8: "
                        f"iconv -f {encoding_of(start).upper()} -t UTF-8 converts it")
    ending = Path(path).suffix.lower()
    if start and ending in COMPRESSED.values() and not compression(path) and not start.lstrip().startswith(b"<"):
        raise UserError(f"{path}: damaged or cut short (neither {ending[1:]} nor XML by its first bytes)")


def decompressed(path, raw):
    """The decompressed bytes of the open file `raw`, as a stream."""
    ending = compression(path)
    openers = {".bz2": bz2.open, ".xz": lzma.open, ".gz": gzip.open, ".zst": open_zstd}
    return openers[ending](raw) if ending else raw


def open_zstd(raw) -> io.BufferedReader:
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{raw.name}: compressed with zstd, and zstandard is not installed (pip install zstandard)") \
            from None
    return io.BufferedReader(ZstdFile(raw, zstandard), 1 << 17)


class ZstdFile(io.RawIOBase):
    """A zstd file of any number of frames.  zstandard's own reader takes a cut file for a whole one."""

    def __init__(self, raw, library):
        self.raw, self.library, self.decoder, self.rest = raw, library, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.rest:
            packed = (self.decoder.unused_data if self.decoder and self.decoder.eof else b"") or self.raw.read(1 << 17)
            if not packed:
                if self.decoder and not self.decoder.eof:
                    raise EOFError("the file ends before its last frame does")
                return 0
            if not self.decoder or self.decoder.eof:
                self.decoder = self.library.ZstdDecompressor().decompressobj()
            try:
                self.rest = self.decoder.decompress(packed)
            except self.library.ZstdError as error:
                raise OSError(str(error)) from None
        count = min(len(buffer), len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


def unpack(archive, folder: Path, wanted: list[str] | None = None) -> list[Path]:
    """Unpack a .zip or .tar(.gz, .bz2, .xz), all files or those wanted, below `folder`; returns their paths."""
    try:
        if is_html(first_bytes(archive)):
            raise UserError(f"{archive}: an HTML page, no archive: download it again")
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
