"""Downloads from a server on this machine that behaves well, badly, or not at all."""

import hashlib
import re
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from dmd.data import download, mosi_utterances

CONTENT = {
    "words.csv": b'"one","two"\n' * 20_000,
    "sub/numbers.csv": np.random.default_rng(0).bytes(300_000),
}
SIZE = len(CONTENT["sub/numbers.csv"])


class Server(ThreadingHTTPServer):
    """Serves CONTENT below /base; the settings below make it misbehave."""

    ranges = True  # answer Range requests
    cut_after = None  # send only that many bytes of sub/numbers.csv, then hang up
    content = CONTENT

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []  # (path, Range header)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/base"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = self.path.removeprefix("/base/")
        asked = self.headers.get("Range")
        self.server.requests.append((path, asked))
        body = self.server.content.get(path)
        if body is None:
            self.send_error(404)
            return
        start = 0
        if asked and self.server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = len(body)
        if path == "sub/numbers.csv" and self.server.cut_after is not None:
            end = start + self.server.cut_after
        self.wfile.write(body[start:end])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    checksums = {path: hashlib.sha256(body).hexdigest() for path, body in CONTENT.items()}
    monkeypatch.setitem(download.SOURCES, "mosi_utterances", ("http://unused.invalid", checksums))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def files_below(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def fetch(server, folder, **options):
    return download.fetch("mosi_utterances", folder, server.url, **options)


def failure(kind, server, folder):
    """The message of the error that fetching raises: one sentence, however it failed."""
    with pytest.raises(kind) as error:
        fetch(server, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_downloads_everything_under_its_final_name(server, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert fetch(server, folder) == folder
    assert files_below(folder) == CONTENT
    reported = capsys.readouterr()
    assert reported.out == ""
    assert reported.err.splitlines() == [
        "[1/2] words.csv: verified",
        "[2/2] sub/numbers.csv: verified",
    ]


def test_verified_files_are_not_asked_for_again(server, tmp_path, capsys):
    fetch(server, tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    server.requests.clear()
    (tmp_path / "words.csv").write_text("changed since")
    fetch(server, tmp_path)
    assert server.requests == [("words.csv", None)]
    assert files_below(tmp_path) == CONTENT
    assert "sub/numbers.csv: is there already" in capsys.readouterr().err


def test_default_folder_is_where_the_loader_looks(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DMD_DATA", raising=False)
    fetch(server, None)
    assert files_below(tmp_path / "data" / "downloads" / "mosi_utterances") == CONTENT
    monkeypatch.setenv("DMD_DATA", str(tmp_path / "other"))
    fetch(server, None)
    for path in CONTENT:
        assert mosi_utterances.candidates(tmp_path / "other", path)


def test_the_real_source_has_the_pinned_commit_and_the_loaders_checksums():
    url, files = download.SOURCES["mosi_utterances"]
    assert re.fullmatch(r"https://\S+/[0-9a-f]{40}/data", url)
    assert files is mosi_utterances.FILES and len(set(files.values())) == 9


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_connection_is_reported_and_then_resumed(server, tmp_path, ranges):
    server.ranges, server.cut_after = ranges, 100_000
    message = failure(OSError, server, tmp_path)
    assert f"cut after 100,000 of {SIZE:,} bytes" in message
    assert f"{server.url}/sub/numbers.csv" in message
    assert str(tmp_path / "sub" / "numbers.csv") in message and "run the same command" in message
    part = CONTENT["sub/numbers.csv"][:100_000]
    assert files_below(tmp_path) == {
        "words.csv": CONTENT["words.csv"],
        "sub/numbers.csv.part": part,
    }
    server.cut_after = None
    server.requests.clear()
    fetch(server, tmp_path)
    assert server.requests == [("sub/numbers.csv", "bytes=100000-")]
    assert files_below(tmp_path) == CONTENT


def test_several_cuts_add_up(server, tmp_path):
    server.cut_after = 120_000
    for have in (120_000, 240_000):
        assert f"{have:,} of {SIZE:,}" in failure(OSError, server, tmp_path)
    fetch(server, tmp_path)
    assert files_below(tmp_path) == CONTENT


def test_a_complete_part_is_used_as_it_is(server, tmp_path):
    (tmp_path / "words.csv.part").write_bytes(CONTENT["words.csv"])
    fetch(server, tmp_path)
    assert ("words.csv", None) not in server.requests and len(server.requests) == 1
    assert files_below(tmp_path) == CONTENT


def test_a_part_that_is_too_long_is_replaced(server, tmp_path):
    (tmp_path / "words.csv.part").write_bytes(CONTENT["words.csv"] + b"more")
    fetch(server, tmp_path)
    assert files_below(tmp_path) == CONTENT


def test_wrong_content_is_deleted_and_said(server, tmp_path):
    server.content = {**CONTENT, "words.csv": b"something else"}
    message = failure(ValueError, server, tmp_path)
    assert f"{server.url}/words.csv is not the published file" in message
    assert "deleted" in message and str(tmp_path / "words.csv") in message
    assert files_below(tmp_path) == {}


def test_a_part_of_another_file_is_deleted_and_the_next_try_succeeds(server, tmp_path):
    (tmp_path / "words.csv.part").write_bytes(b"not the beginning")
    assert "deleted" in failure(ValueError, server, tmp_path)
    fetch(server, tmp_path)
    assert files_below(tmp_path) == CONTENT


def test_wrong_content_does_not_replace_what_was_there(server, tmp_path):
    (tmp_path / "words.csv").write_text("mine")
    server.content = {**CONTENT, "words.csv": b"something else"}
    failure(ValueError, server, tmp_path)
    assert files_below(tmp_path) == {"words.csv": b"mine"}


def test_a_missing_file_on_the_server(server, tmp_path):
    server.content = {"words.csv": CONTENT["words.csv"]}
    message = failure(OSError, server, tmp_path)
    assert "HTTP 404" in message and f"{server.url}/sub/numbers.csv" in message
    assert str(tmp_path / "sub" / "numbers.csv") in message


def test_offline(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError) as error:
        download.fetch("mosi_utterances", tmp_path, f"http://127.0.0.1:{port}/")
    message = str(error.value)
    assert "\n" not in message and "refused" in message
    assert f"http://127.0.0.1:{port}/words.csv" in message  # one slash, not two
    assert str(tmp_path / "words.csv") in message
    assert files_below(tmp_path) == {}


def test_a_server_that_does_not_speak_http(tmp_path, server):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"hello\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match=r"words\.csv failed \(hello"):
            download.fetch(to=tmp_path, base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_a_silent_server_times_out(tmp_path, server, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(OSError, match="timed out"),
    ):
        download.fetch(to=tmp_path, base_url=f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_an_unwritable_folder(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = failure(OSError, server, tmp_path / "file" / "folder")
    assert f"can't write to {tmp_path / 'file' / 'folder'}" in message
    assert "another folder" in message
    assert server.requests == []


def test_an_unknown_dataset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mosi_utterances'"):
        download.fetch("mosi_utterance")
