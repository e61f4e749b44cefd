import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import read

TEXT = b"user,item\n1,2\n1,3\n"


def zipped(**files: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(TEXT),
        bz2.compress(TEXT),
        lzma.compress(TEXT),
        zipped(ratings=TEXT),
        zipped(**{"set/": b"", "set/ratings.csv": TEXT, "__MACOSX/._x": b"1"}),
        zipped(ratings=gzip.compress(TEXT)),
    ],
    ids=["gzip", "bzip2", "xz", "zip", "zip with a folder", "gzip in zip"],  # the bytes hold the time
)
def test_a_packed_file_is_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data").write_bytes(content)
    assert read(tmp_path / "data").rows() == [(1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(TEXT)[:-9], r"data: is packed and cannot be unpacked .* is it complete\?"),
        (gzip.compress(b""), r"data: is empty"),
        (zipped(a=TEXT, b=TEXT), r"data: is a zip archive of 2 files; unpack it and name one of them: a, b"),
        (zipped(a=TEXT)[:-30], r"data: is a zip archive that cannot be unpacked"),
        (zipped(**{"[Content_Types].xml": b""}), r"data: is an Excel workbook"),
        (b"\x28\xb5\x2f\xfd1234", r"data: is packed with zstd; unpack it: zstd -d FILE"),
        (b"ratings.csv".ljust(257, b"\0") + b"ustar\0", r"data: is a tar archive"),
        (b"%PDF-1.4", r"data: is a PDF document"),
        (b"\x89HDF\r\n", r"data: is an HDF5 file"),
        (b"\x80\x04\x95\x00", r"data: is a pickle of Python, which is never opened"),
        (b"\n<!DOCTYPE html><html>", r"data: is a web page, not a table; was the download complete\?"),
        (b'<?xml version="1.0"?>', r"data: is an XML file"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_file_is(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "data")
    assert "\n" not in str(caught.value)
