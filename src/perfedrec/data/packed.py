"""Files that are packed, or that are something else than text: unpacking the former, naming the latter."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zipfile
import zlib
from pathlib import Path

from perfedrec.core.errors import DataError
from perfedrec.core.nearest import listing

PACKERS = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress}
OTHERS = (  # the first bytes of a file, what it is, and what to do
    (b"\x28\xb5\x2f\xfd", "is packed with zstd", "unpack it: zstd -d FILE"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it and name a file in it"),
    (b"Rar!", "is a rar archive", "unpack it and name a file in it"),
    (b"%PDF", "is a PDF document", "expected text or parquet"),
    (b"SQLite format 3", "is an SQLite database", "write a table of it to a CSV file"),
    (b"\x89HDF", "is an HDF5 file", "write it as CSV or parquet"),
    (b"MATLAB 5.0", "is a MATLAB file", "write it as CSV or parquet"),
    (b"\x93NUMPY", "is a numpy array", "write it as CSV or parquet, or pass arrays in Python"),
    (b"ARROW1", "is an Arrow (feather) file", "write it as parquet"),
    (b"\xd0\xcf\x11\xe0", "is an old Excel workbook", "save the sheet as CSV"),
    (b"version https://git-lfs", "is a pointer to a file in Git LFS", "fetch the file: git lfs pull"),
)
PICKLE = re.compile(rb"\x80[\x02-\x05][\x8c\x95}\](c\x58]")
PAGE = re.compile(rb"\s*<(!doctype|html|\?xml)", re.IGNORECASE)


def unpack(path: Path, data: bytes) -> bytes:
    """The content of a file that may be packed with gzip, bzip2, xz or zip.

    Raises :class:`DataError` for a damaged file, an archive of several files, and a file that is known to be neither
    text nor parquet.
    """
    if data[:4] == b"PK\x03\x04":
        return unpack(path, _from_zip(path, data))
    for start, decompress in PACKERS.items():
        if data.startswith(start):
            try:
                return unpack(path, decompress(data))
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{path}: is packed and cannot be unpacked ({error}); is it complete?") from None
    if data[257:262] == b"ustar":
        raise DataError(f"{path}: is a tar archive; unpack it (tar -xf FILE) and name a file in it")
    for start, what, way in OTHERS:
        if data.startswith(start):
            raise DataError(f"{path}: {what}; {way}")
    if PICKLE.match(data):
        raise DataError(f"{path}: is a pickle of Python, which is never opened; write it as CSV or parquet")
    if page := PAGE.match(data):
        what = "an XML file" if page[1].startswith(b"?") else "a web page"
        raise DataError(f"{path}: is {what}, not a table; was the download complete? expected text or parquet")
    return data


def _from_zip(path: Path, data: bytes) -> bytes:
    """The only file in a zip archive."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
        if "[Content_Types].xml" in names:
            raise DataError(f"{path}: is an Excel workbook or another office document; save the sheet as CSV")
        if len(names) != 1:
            listed = listing(names[:8]) + (", ..." if len(names) > 8 else "")
            raise DataError(
                f"{path}: is a zip archive of {len(names)} files; unpack it and name one of them: {listed or 'none'}"
            )
        return archive.read(names[0])
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: is a zip archive that cannot be unpacked ({error})") from None
    except RuntimeError:  # zipfile has no narrower class for it
        raise DataError(f"{path}: is a zip archive with a password; unpack it first") from None
