"""A server on this machine that answers as Hugging Face's hub does, for one model and one data set."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from huggingface_hub import constants

PATH = "/{repo_id}/resolve/{revision}/{filename}"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
DATASET = "someone/pictures"


class Server:
    """The hub's stand-in: `someone/thing` is a model, `someone/pictures` a data set. Keeps what was asked."""

    def __init__(self) -> None:
        self.files = {"config.json": b'{"a": 1}', "weights.bin": b"numbers"}
        """Of the model, by name."""
        self.pictures: dict[str, bytes] = {}
        """Of the data set, by name."""
        self.gone: set[str] = set()
        """Of the data set, files that are listed and cannot be had."""
        self.gated = self.private = False
        """Whether the data set's files, or the data set, are kept from us."""
        self.before_listing: Callable[[], None] = lambda: None
        """Called each time before the data set is described to somebody."""
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                server.asked.append(f"{self.command} {self.path}")
                status, error, commit, content = server.answer(urlsplit(self.path).path)
                self.send_response(status)
                self.send_header("X-Repo-Commit", commit)
                if error:
                    self.send_header("X-Error-Code", error)
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            do_GET = do_HEAD

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_address[1]}"

    @property
    def commit(self) -> str:
        """Of the data set: another one when its files are others."""
        return hashlib.sha1(repr(sorted(self.pictures.items())).encode()).hexdigest()

    def downloads(self) -> list[str]:
        """The data set's files that were sent, in order."""
        start = f"GET /datasets/{DATASET}/resolve/"
        return [asked.removeprefix(start).partition("/")[2] for asked in self.asked if asked.startswith(start)]

    def answer(self, path: str) -> tuple[int, str, str, bytes]:
        """HTTP status, the hub's error code, commit and content."""
        model = self.files.get(path.removeprefix("/someone/thing/resolve/main/"))
        if model is not None:
            return 200, "", COMMIT, model
        api, files = f"/api/datasets/{DATASET}", f"/datasets/{DATASET}/resolve/{self.commit}/"
        if self.private or not path.startswith((api, files)):
            return 404, "EntryNotFound" if path.startswith("/someone/thing/") else "RepoNotFound", COMMIT, b""
        if path in (api, f"{api}/revision/main"):
            return 200, "", self.commit, self._description()
        if path == f"{api}/tree/{self.commit}":
            return 200, "", self.commit, json.dumps(self._tree()).encode()
        name = path.removeprefix(files)
        if self.gated:
            return 403, "GatedRepo", self.commit, b""
        if name in self.gone:
            return 404, "EntryNotFound", self.commit, b""
        return 200, "", self.commit, self.pictures[name]

    def _description(self) -> bytes:
        self.before_listing()
        siblings = [{"rfilename": name, "size": len(content)} for name, content in self.pictures.items()]
        return json.dumps({"id": DATASET, "sha": self.commit, "tags": [], "siblings": siblings}).encode()

    def _tree(self) -> list[dict[str, object]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.pictures.items()
        ]


@contextmanager
def running(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The stand-in serves while the block runs, with a cache of its own; the network may be used."""
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", made.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.address + PATH)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield made
    made.http.shutdown()
    made.http.server_close()
    thread.join()
