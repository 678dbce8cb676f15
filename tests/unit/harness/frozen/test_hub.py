"""The hub: a server on this machine stands in for it, and offline nothing is asked of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from harness.errors import UserError
from harness.frozen import hub
from tests.unit.harness.frozen.hub_factory import COMMIT, PATH, Server, running


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with running(tmp_path, monkeypatch) as server:
        yield server


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
