"""Downloading public data sets, and checking them against the checksums of their publishers."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from perfedrec.core.errors import DataError
from perfedrec.data.formats import check_name

MOVIELENS = "https://files.grouplens.org/datasets/movielens/"
MOVIELENS_LICENCE = (
    "MovieLens, GroupLens Research, University of Minnesota: for research, with acknowledgement (Harper and Konstan, "
    "2015, doi 10.1145/2827872); no redistribution and no commercial use without permission. See README in the folder."
)


@dataclass(frozen=True)
class Source:
    """A zip archive: its file name, the address of its folder, its MD5 checksum, and its licence in a sentence."""

    archive: str
    base_url: str
    md5: str
    licence: str


SOURCES = {
    "ml-100k": Source("ml-100k.zip", MOVIELENS, "0e33842e24a9c977be4e0107933c0723", MOVIELENS_LICENCE),
    "ml-1m": Source("ml-1m.zip", MOVIELENS, "c4d9eecfca2ab87c1945afe126590906", MOVIELENS_LICENCE),
    "ml-20m": Source("ml-20m.zip", MOVIELENS, "cd245b17a1ae2cc31bb14903e1204af3", MOVIELENS_LICENCE),
}


def fetch(
    name: str, directory: str | Path, *, base_url: str | None = None, sources: dict[str, Source] = SOURCES
) -> Path:
    """Download a data set, unpack it into ``directory / name``, and return that folder.

    ``SOURCES[name].licence`` has its licence. A folder that exists and is not empty is returned as it is. ``base_url``
    is the address of a mirror. The folder appears only when it is complete. Raises :class:`DataError`, and leaves no
    files behind, where the download fails, the checksum differs from the published one, or the archive has a path that
    leads out of the folder.
    """
    import pooch  # imported here because only this function uses the network
    import requests

    check_name(name, tuple(sources), "data set")
    source, target = sources[name], Path(directory) / name
    if target.is_dir() and any(target.iterdir()):
        return target
    url = (base_url or source.base_url).rstrip("/") + "/" + source.archive
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target.parent) as scratch:
        archive, unpacked = Path(scratch) / source.archive, Path(scratch) / "unpacked"
        try:
            pooch.HTTPDownloader(timeout=30)(url, str(archive), None)
        except (requests.RequestException, OSError, ValueError) as error:
            raise DataError(f"{url}: the download failed ({type(error).__name__}: {error})") from None
        found = pooch.file_hash(str(archive), alg="md5")
        if found != source.md5:
            raise DataError(
                f"{url}: the archive is damaged or not the published one; expected MD5 {source.md5}, found {found} "
                f"({archive.stat().st_size:,} bytes)"
            )
        unpack(archive, unpacked)
        inner = list(unpacked.iterdir())
        whole = inner[0] if len(inner) == 1 and inner[0].is_dir() else unpacked
        if target.is_dir():
            target.rmdir()  # it is empty
        os.replace(whole, target)
    return target


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a zip file into ``folder``.

    Raises :class:`DataError` before anything is written, where the path of an entry leads out of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                link = stat.S_ISLNK(entry.external_attr >> 16)
                if link or path.is_absolute() or ".." in path.parts or ":" in path.parts[0]:
                    raise DataError(
                        f"{archive.name}: entry {entry.filename!r} leads out of the folder; nothing was unpacked"
                    )
            folder.mkdir(parents=True)
            opened.extractall(folder)
    except (zipfile.BadZipFile, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DataError(f"{archive.name}: is not a readable zip archive ({error})") from None
