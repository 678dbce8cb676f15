"""The hub: a server on this machine stands in for it, and offline nothing is asked of it."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness import hub
from harness.errors import UserError

PATH = "/{repo_id}/resolve/{revision}/{filename}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server:
    """Answers as the hub does to a request for a file of `someone/thing`, and keeps what was asked."""

    def __init__(self) -> None:
        self.files = {"config.json": b'{"a": 1}', "weights.bin": b"numbers"}
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                server.asked.append(f"{self.command} {self.path}")
                content = server.files.get(self.path.removeprefix("/someone/thing/resolve/main/"))
                self.send_response(404 if content is None else 200)
                self.send_header("X-Repo-Commit", COMMIT)
                if content is None:
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.end_headers()
                    return
                self.send_header("ETag", f'"{content.hex()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_GET = do_HEAD

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The hub's stand-in, with a cache of its own; the network may be used."""
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + PATH)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()


def test_a_file_is_asked_for_once(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    path = hub.fetch("someone/thing", ("weights.safetensors", "weights.bin"))
    assert path is not None and path.read_bytes() == b"numbers" and path.name == "weights.bin"
    assert COMMIT in path.parts
    asked = len(server.asked)
    assert asked
    assert hub.fetch("someone/thing", ("weights.safetensors", "weights.bin")) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("someone/thing", ("weights.safetensors", "weights.bin")) == path
    assert len(server.asked) == asked


def test_files_of_one_repository_lie_in_one_folder(server: Server) -> None:
    first, second = (hub.fetch("someone/thing", (name,)) for name in ("config.json", "weights.bin"))
    assert first is not None and second is not None and first.parent == second.parent


def test_offline_nothing_is_asked(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.is_offline()
    assert hub.fetch("someone/thing", ("weights.bin",)) is None
    assert server.asked == []


def test_what_the_hub_does_not_have_is_one_line(server: Server) -> None:
    with pytest.raises(UserError, match=r"nothing\.bin of someone/thing cannot be had from the hub \(") as raised:
        hub.fetch("someone/thing", ("nothing.bin",))
    assert "\n" not in str(raised.value)


def test_a_network_that_is_away_is_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9" + PATH
    )  # the port of "discard", which nobody serves
    with pytest.raises(UserError, match=r"weights\.bin of someone/thing cannot be had from the hub") as raised:
        hub.fetch("someone/thing", ("weights.bin",))
    assert "\n" not in str(raised.value)
