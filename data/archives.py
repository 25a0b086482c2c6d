"""Archives, unpacked without ever leaving their folder."""

import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from cli import UserError
from file_utils import replacing

BLOCK = 1 << 20


def unpack(archive, folder) -> list[Path]:
    """Unpack the regular files of a .zip or .tar(.gz, .bz2, .xz) below `folder`; returns their paths.

    Raises UserError, before anything is written, where a member would leave the folder or is a link or a device.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                members = [(info.filename, info) for info in file.infolist() if not info.is_dir()]
                odd = [name for name, info in members if stat.S_ISLNK(info.external_attr >> 16)]
                return unpack_members(archive, folder, members, odd, file.open)
        with tarfile.open(archive) as file:
            members = [(info.name, info) for info in file if not info.isdir()]
            odd = [name for name, info in members if not info.isreg()]
            return unpack_members(archive, folder, members, odd, file.extractfile)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{archive}: no readable archive ({error})") from None


def unpack_members(archive: Path, folder: Path, members, odd: list[str], opener) -> list[Path]:
    """Write each (name, member) of an archive to its place, after all names were looked at."""
    for name, _ in members:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in path.parts[0] or name in odd:
            raise UserError(f"{archive}: {name!r} would leave the folder, or is no regular file; nothing was unpacked")
    for name, member in members:
        with replacing(folder / name) as temporary, opener(member) as packed, open(temporary, "wb") as file:
            while block := packed.read(BLOCK):
                file.write(block)
    return [folder / name for name, _ in members]
