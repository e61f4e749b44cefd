import hashlib
import http.server
import io
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from perfedrec.core.errors import DataError
from perfedrec.data import SOURCES, Source, fetch, read


def archive(entries: dict[str, str]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        for name, text in entries.items():
            opened.writestr(name, text)
    return stream.getvalue()


GOOD = archive({"tiny/u.data": "1\t2\t3\t881250949\n1\t4\t5\t881250950\n", "tiny/README": "ours"})


def source(content: bytes) -> dict[str, Source]:
    return {"tiny": Source("tiny.zip", "http://127.0.0.1:9/nowhere/", hashlib.md5(content).hexdigest(), "ours")}


class Server:
    """The answer of the local server: ``content``, with the Content-Length ``length`` if that is given."""

    content, length, url, requests = GOOD, None, "", 0


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests += 1
            if self.path != "/data/tiny.zip":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(served.length or len(served.content)))
            self.end_headers()
            self.wfile.write(served.content)

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        served.url = f"http://127.0.0.1:{running.server_port}/data/"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield served
        running.shutdown()
        thread.join()


def test_a_good_archive_is_unpacked_once(server: Server, tmp_path: Path) -> None:
    folder = fetch("tiny", tmp_path / "new", base_url=server.url, sources=source(GOOD))
    assert folder == tmp_path / "new" / "tiny"
    assert read(folder / "u.data", "ml-100k").height == 2
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    assert fetch("tiny", tmp_path / "new", base_url=server.url, sources=source(GOOD)) == folder
    assert server.requests == 1


@pytest.mark.parametrize("base_url", ["/data", "/data/"])
def test_a_mirror_with_and_without_slash(server: Server, tmp_path: Path, base_url: str) -> None:
    mirror = server.url.removesuffix("/data/") + base_url
    assert fetch("tiny", tmp_path, base_url=mirror, sources=source(GOOD)).is_dir()


def test_files_at_the_top_of_an_archive(server: Server, tmp_path: Path) -> None:
    server.content = archive({"a.txt": "1", "b/c.txt": "2"})
    folder = fetch("tiny", tmp_path, base_url=server.url, sources=source(server.content))
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")) == ["a.txt", "b/c.txt"]


def refused(server: Server, folder: Path, sources: dict[str, Source], message: str) -> None:
    with pytest.raises(DataError, match=message):
        fetch("tiny", folder, base_url=server.url, sources=sources)
    assert list(folder.iterdir()) == []


def test_a_tampered_archive(server: Server, tmp_path: Path) -> None:
    server.content = GOOD.replace(b"ours", b"evil")
    expected, found = (hashlib.md5(content).hexdigest() for content in (GOOD, server.content))
    refused(server, tmp_path, source(GOOD), f"expected MD5 {expected}, found {found}")


@pytest.mark.parametrize("length", [None, len(GOOD)])
def test_a_truncated_archive(server: Server, tmp_path: Path, length: int | None) -> None:
    server.content, server.length = GOOD[:100], length
    message = "the download failed" if length else "expected MD5 .* found .* \\(100 bytes\\)"
    refused(server, tmp_path, source(GOOD), message)


def test_a_page_that_does_not_exist(server: Server, tmp_path: Path) -> None:
    server.url += "elsewhere/"
    refused(server, tmp_path, source(GOOD), "the download failed .*404")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "..\\outside", "C:/outside"])
def test_an_archive_that_leads_out_of_its_folder(server: Server, tmp_path: Path, name: str) -> None:
    server.content = archive({"tiny/a": "1", name: "evil"})
    inside = tmp_path / "inside"
    inside.mkdir()
    refused(server, inside, source(server.content), "leads out of the folder; nothing was unpacked")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"]


def test_an_archive_with_a_link(server: Server, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        entry = zipfile.ZipInfo("link")
        entry.external_attr = 0o120777 << 16
        opened.writestr(entry, "/etc")
    server.content = stream.getvalue()
    refused(server, tmp_path, source(server.content), "leads out of the folder")


def test_a_file_that_is_not_an_archive(server: Server, tmp_path: Path) -> None:
    server.content = b"<html>sorry</html>"
    refused(server, tmp_path, source(server.content), "tiny.zip: is not a readable zip archive")


def test_known_sources() -> None:
    with pytest.raises(DataError, match=r"unknown data set 'ml-100'.*did you mean ml-100k"):
        fetch("ml-100", ".")
    for name, known in SOURCES.items():
        assert known.archive == f"{name}.zip"
        assert known.base_url == "https://files.grouplens.org/datasets/movielens/"
        assert len(known.md5) == 32
        assert "no redistribution" in known.licence
