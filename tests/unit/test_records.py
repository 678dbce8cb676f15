"""Records survive crashes: canonical JSON, atomic writes, cut lines, and folders that are replaced whole or not."""

import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from harness import records
from harness.errors import UserError
from harness.records import RunFolder


def test_canonical_json_by_hand() -> None:
    value = {"b": (1, 2.5), "a": {"y": None, "x": True}, 3: Path("runs/x"), "é": "ü"}
    assert records.canonical(value) == (r'{"3":"runs/x","a":{"x":true,"y":null},"b":[1,2.5],"\u00e9":"\u00fc"}')


def test_canonical_does_not_depend_on_order_or_container() -> None:
    assert records.canonical({"a": [1], "b": 2}) == records.canonical({"b": 2, "a": (1,)})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_numbers_travel_as_strings(value: float) -> None:
    text = records.canonical({"x": [value]})
    back = records.number(json.loads(text)["x"][0])
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert text in ('{"x":["inf"]}', '{"x":["-inf"]}', '{"x":["nan"]}')


def test_digests_are_sha256_of_the_text(tmp_path: Path) -> None:
    assert records.digest({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert records.file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("name", "title", "direction"),
    [
        ("fid50k", "FID", "lower"),
        ("kid5k", "KID", "lower"),
        ("fd_pixels", "FD on pixels", "lower"),
        ("fd_pixels_898", "FD on pixels", "lower"),
        ("fd_efficientnet_lite0_898", "Fréchet distance", "lower"),
        ("kd_efficientnet_lite0_898", "Kernel distance", "lower"),
        ("precision_efficientnet_lite0_898", "Precision", "higher"),
        ("recall_efficientnet_lite0_898", "Recall", "higher"),
        ("class_accuracy", "Asked class named", "higher"),
        ("velocity_loss_t0", "Held-out velocity loss", "lower"),
    ],
)
def test_metric_families(name: str, title: str, direction: str) -> None:
    found = records.metric(name)
    assert (found.title, found.direction) == (title, direction)


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match=r"metric 'psnr' is not known: metrics begin with fid, kid"):
        records.metric("psnr")


@pytest.mark.parametrize(
    ("num", "name"), [(898, "898"), (999, "999"), (1000, "1k"), (1500, "1500"), (50_000, "50k"), (50_001, "50001")]
)
def test_count_name(num: int, name: str) -> None:
    assert records.count_name(num) == name


# -- files ----------------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_atomic_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    records.write_atomic(path, b"one, and longer")
    records.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names_in(tmp_path) == {"file"}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "file"
    records.write_atomic(path, b"old")

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        records.write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {"file"}


def test_json_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    records.write_json(path, {"b": (1, 2), "a": math.nan})
    assert records.read_json(path) == {"a": "nan", "b": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), (b"{", "is not valid JSON"), (b"\xff", "is not valid JSON")]
)
def test_unreadable_json_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        records.read_json(path)
    assert str(path) in str(caught.value)


# -- the run folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(records.run_path(tmp_path, "study", "cell", 3))
    folder.create()
    return folder


def test_run_folder_layout(tmp_path: Path, run: RunFolder) -> None:
    assert run.path == tmp_path / "study" / "cell" / "seed3"
    assert names_in(run.path) == {"checkpoints", "samples"}
    assert records.seed_of(run) == 3
    run.create()  # making it again is harmless


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"output\.runs: cannot write to .*taken/seed0 \(Not a directory\): name a"):
        RunFolder(tmp_path / "taken" / "seed0").create()


def test_manifest_and_status(run: RunFolder) -> None:
    assert not run.exists()
    assert run.status() is None
    run.write_manifest({"status": "running", "seed": 3})
    run.update_manifest(status="finished", steps=10)
    assert run.status() == "finished"
    assert run.manifest() == {"format": 1, "status": "finished", "seed": 3, "steps": 10}


def test_lines_come_back_in_order(run: RunFolder) -> None:
    assert run.lines("train") == []
    written = [{"step": step, "loss": 1 / step, "note": "a\u2028b\nc"} for step in (1, 2, 3)]
    for record in written:
        run.append("train", record)
    assert run.lines("train") == written
    assert run.lines("eval") == []


@pytest.mark.parametrize("cut", ['{"step":2', '{"step":2}'])
def test_a_last_line_cut_by_a_crash_is_left_out(run: RunFolder, cut: str) -> None:
    run.append("train", {"step": 1})
    with (run.path / "train.jsonl").open("a") as file:
        file.write(cut)  # no newline: the write did not finish
    assert run.lines("train") == [{"step": 1}]
    run.truncate(step=1)
    run.append("train", {"step": 2})
    assert run.lines("train") == [{"step": 1}, {"step": 2}]


def test_truncate_drops_later_steps_from_both_files(run: RunFolder) -> None:
    run.truncate(0)  # nothing there yet
    assert names_in(run.path) == {"checkpoints", "samples"}
    for step in (5, 10, 15):
        run.append("train", {"step": step, "loss": math.inf})
    for step in (10, 20):
        run.append("eval", {"step": step})
    run.truncate(step=10)
    assert run.lines("train") == [{"step": 5, "loss": "inf"}, {"step": 10, "loss": "inf"}]
    assert run.lines("eval") == [{"step": 10}]
    assert names_in(run.path) == {"checkpoints", "samples", "train.jsonl", "eval.jsonl"}


def test_find_runs_sorts_by_cell_then_seed(tmp_path: Path) -> None:
    for cell, seed in (("b", 0), ("a", 10), ("a", 2)):
        folder = RunFolder(records.run_path(tmp_path, "study", cell, seed))
        folder.create()
        folder.write_manifest({"status": "finished"})
    RunFolder(records.run_path(tmp_path, "study", "c", 0)).create()  # no manifest: it has not begun
    (tmp_path / "study" / "report").mkdir()
    found = [run.path.relative_to(tmp_path / "study").as_posix() for run in records.find_runs(tmp_path / "study")]
    assert found == ["a/seed2", "a/seed10", "b/seed0"]


def test_find_runs_passes_over_copies_that_are_no_run(tmp_path: Path) -> None:
    for name in ("seed0", "seed0_old", "seed"):
        folder = RunFolder(tmp_path / "study" / "a" / name)
        folder.create()
        folder.write_manifest({"status": "finished"})
    assert [run.path.name for run in records.find_runs(tmp_path / "study")] == ["seed0"]


def test_a_study_without_runs_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs: name a study folder"):
        records.find_runs(tmp_path)


# -- replacing a folder ---------------------------------------------------------------------------------------------


def test_replaced_makes_and_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("one", "two"):
        with records.replaced(target) as fresh:
            assert names_in(fresh) == set()
            (fresh / content).write_text(content)
        assert names_in(target) == {content}
    assert names_in(tmp_path) == {"target"}


def test_replaced_leaves_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with records.replaced(target) as fresh:
        (fresh / "old").write_text("old")

    def interrupted() -> None:
        with records.replaced(target) as fresh:
            (fresh / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(target) == {"old"}
    assert names_in(tmp_path) == {"target"}


def test_replaced_puts_the_old_folder_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    with records.replaced(target) as fresh:
        (fresh / "old").write_text("old")
    rename = Path.rename

    def fail_into_place(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("the disk went away")
        return rename(self, to)

    def swap() -> None:
        with records.replaced(target) as fresh:
            (fresh / "new").write_text("new")
            monkeypatch.setattr(Path, "rename", fail_into_place)

    with pytest.raises(OSError, match="the disk went away"):
        swap()
    assert names_in(target) == {"old"}
    assert names_in(tmp_path) == {"target"}
