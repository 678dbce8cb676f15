"""Records survive crashes: canonical JSON, atomic writes, cut lines, and folders that are replaced whole or not."""

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from harness.errors import StorageError, UserError
from harness.records import files, locks, metrics, run_folder
from harness.records.run_folder import RunFolder
from tests.unit.harness.records.plain_records import eval_line, manifest, train_line


def test_canonical_json_by_hand() -> None:
    value = {"b": (1, 2.5), "a": {"y": None, "x": True}, 3: Path("runs/x"), "é": "ü"}
    assert files.canonical(value) == (r'{"3":"runs/x","a":{"x":true,"y":null},"b":[1,2.5],"\u00e9":"\u00fc"}')


def test_canonical_does_not_depend_on_order_or_container() -> None:
    assert files.canonical({"a": [1], "b": 2}) == files.canonical({"b": 2, "a": (1,)})


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_non_finite_numbers_travel_as_strings(value: float) -> None:
    text = files.canonical({"x": [value]})
    back = files.number(json.loads(text)["x"][0])
    assert back == value or (math.isnan(back) and math.isnan(value))
    assert text in ('{"x":["inf"]}', '{"x":["-inf"]}', '{"x":["nan"]}')


def test_digests_are_sha256_of_the_text(tmp_path: Path) -> None:
    assert files.digest({"b": 1, "a": [2]}) == hashlib.sha256(b'{"a":[2],"b":1}').hexdigest()
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    assert files.file_digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize(
    ("name", "title", "direction"),
    [
        ("fid50k", "FID", "lower"),
        ("kid5k", "KID", "lower"),
        ("sfid50k", "sFID", "lower"),
        ("is50k", "Inception score", "higher"),
        ("is_inception_unverified_24", "Inception score", "higher"),
        ("sfd_inception_unverified_24", "Spatial Fréchet distance", "lower"),
        ("precision50k", "Precision", "higher"),
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
    found = metrics.metric(name)
    assert (found.title, found.direction) == (title, direction)


def test_unknown_metric_is_refused() -> None:
    with pytest.raises(UserError, match=r"metric 'psnr' is not known: metrics begin with fid, kid"):
        metrics.metric("psnr")


@pytest.mark.parametrize(
    ("num", "name"), [(898, "898"), (999, "999"), (1000, "1k"), (1500, "1500"), (50_000, "50k"), (50_001, "50001")]
)
def test_count_name(num: int, name: str) -> None:
    assert metrics.count_name(num) == name


# -- files ----------------------------------------------------------------------------------------------------------


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_atomic_replaces_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"one, and longer")
    files.write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert names_in(tmp_path) == {"file"}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def fail(*args: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_atomic(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == {"file"}


def test_json_files_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    files.write_json(path, {"b": (1, 2), "a": math.nan})
    assert files.read_json(path) == {"a": "nan", "b": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), (b"{", "is not valid JSON"), (b"\xff", "is not valid JSON")]
)
def test_unreadable_json_names_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        files.read_json(path)
    assert str(path) in str(caught.value)


# -- the run folder -------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(run_folder.run_path(tmp_path, "study", "cell", 3))
    folder.create()
    return folder


def test_run_folder_layout(tmp_path: Path, run: RunFolder) -> None:
    assert run.path == tmp_path / "study" / "cell" / "seed3"
    assert names_in(run.path) == {"checkpoints", "samples"}
    assert run_folder.seed_of(run) == 3
    run.create()  # making it again is harmless


def test_a_folder_that_cannot_be_made_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"output\.runs: cannot write to .*taken/seed0 \(Not a directory\): name a"):
        RunFolder(tmp_path / "taken" / "seed0").create()


def test_manifest_and_status(run: RunFolder) -> None:
    assert not run.exists()
    assert run.status() is None
    run.write_manifest(manifest(seed=3))
    run.update_manifest(status="finished", steps=10)
    assert run.status() == "finished"
    assert run.manifest() == {"format": 2, **manifest(status="finished", seed=3, steps=10)}


def test_lines_come_back_in_order(run: RunFolder) -> None:
    assert run.lines("train") == []
    written = [train_line(step, loss=1 / step, note="a\u2028b\nc") for step in (1, 2, 3)]
    for record in written:
        run.append("train", record)
    assert run.lines("train") == written
    assert run.lines("eval") == []


def test_with_a_stride_the_lines_between_are_left_out_and_the_last_is_not(run: RunFolder) -> None:
    # A number named `step` inside a record is none, before it or behind it.
    term = {"value": 8, "weight": 1}
    written = [train_line(step, diagnostics={"step": 8}, terms={"step": term}) for step in range(2, 17, 2)]
    for record in written:
        run.append("train", record)
    assert [line["step"] for line in run.lines("train", stride=6)] == [6, 12, 16]
    assert run.lines("train", stride=6)[0] == written[2]
    assert (run.num_lines("train"), run.num_lines("eval")) == (8, 0)


@pytest.mark.parametrize("cut", ['{"step":2', '{"step":2}'])
def test_a_last_line_cut_by_a_crash_is_left_out(run: RunFolder, cut: str) -> None:
    run.append("train", train_line(1))
    with (run.path / "train.jsonl").open("a") as file:
        file.write(cut)  # no newline: the write did not finish
    assert run.lines("train") == [train_line(1)]
    run.truncate(step=1)
    run.append("train", train_line(2))
    assert run.lines("train") == [train_line(1), train_line(2)]


def test_truncate_drops_later_steps_from_both_files(run: RunFolder) -> None:
    run.truncate(0)  # nothing there yet
    assert names_in(run.path) == {"checkpoints", "samples"}
    for step in (5, 10, 15):
        run.append("train", train_line(step, loss=math.inf))
    for step in (10, 20):
        run.append("eval", eval_line(step))
    run.truncate(step=10)
    assert run.lines("train") == [train_line(5, loss="inf"), train_line(10, loss="inf")]
    assert run.lines("eval") == [eval_line(10)]
    assert names_in(run.path) == {"checkpoints", "samples", "train.jsonl", "eval.jsonl"}


@pytest.mark.parametrize("damaged", [b'{"step": 1', b"\xff", b"", b"3", b'{"step":1}{"step":2}'])
def test_a_damaged_line_is_named(run: RunFolder, damaged: bytes) -> None:
    run.append("train", train_line(1))
    with (run.path / "train.jsonl").open("ab") as file:
        file.write(damaged + b"\n")
    run.append("train", train_line(3))
    for read in (lambda: run.lines("train"), lambda: run.truncate(5)):
        with pytest.raises(UserError, match=r"train\.jsonl, line 2, is .*: remove the folder and run the cell again"):
            read()


def test_truncate_removes_half_written_files(run: RunFolder) -> None:
    run.write_manifest(manifest())
    for path in (run.path / ".manifest.json.99.tmp", run.samples / ".step_00000004.png.99.tmp"):
        path.write_bytes(b"half")
    run.truncate(0)
    assert names_in(run.path) == {"checkpoints", "samples", "manifest.json"} and not names_in(run.samples)


def test_find_runs_sorts_by_cell_then_seed(tmp_path: Path) -> None:
    for cell, seed in (("b", 0), ("a", 10), ("a", 2)):
        folder = RunFolder(run_folder.run_path(tmp_path, "study", cell, seed))
        folder.create()
        folder.write_manifest({"status": "finished"})
    RunFolder(run_folder.run_path(tmp_path, "study", "c", 0)).create()  # no manifest: it has not begun
    (tmp_path / "study" / "report").mkdir()
    found = [run.path.relative_to(tmp_path / "study").as_posix() for run in run_folder.find_runs(tmp_path / "study")]
    assert found == ["a/seed2", "a/seed10", "b/seed0"]


def test_find_runs_passes_over_copies_that_are_no_run(tmp_path: Path) -> None:
    for name in ("seed0", "seed0_old", "seed"):
        folder = RunFolder(tmp_path / "study" / "a" / name)
        folder.create()
        folder.write_manifest({"status": "finished"})
    assert [run.path.name for run in run_folder.find_runs(tmp_path / "study")] == ["seed0"]


def test_a_study_without_runs_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs: name a study folder"):
        run_folder.find_runs(tmp_path)


# -- replacing a folder ---------------------------------------------------------------------------------------------


def test_replaced_makes_and_replaces_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for content in ("one", "two"):
        with files.replaced(target) as fresh:
            assert names_in(fresh) == set()
            (fresh / content).write_text(content)
        assert names_in(target) == {content}
    assert names_in(tmp_path) == {"target"}


def test_replaced_leaves_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with files.replaced(target) as fresh:
        (fresh / "old").write_text("old")

    def interrupted() -> None:
        with files.replaced(target) as fresh:
            (fresh / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names_in(target) == {"old"}
    assert names_in(tmp_path) == {"target"}


def test_replaced_puts_the_old_folder_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    with files.replaced(target) as fresh:
        (fresh / "old").write_text("old")
    rename = Path.rename

    def fail_into_place(self: Path, to: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError("the disk went away")
        return rename(self, to)

    def swap() -> None:
        with files.replaced(target) as fresh:
            (fresh / "new").write_text("new")
            monkeypatch.setattr(Path, "rename", fail_into_place)

    with pytest.raises(OSError, match="the disk went away"):
        swap()
    assert names_in(target) == {"old"}
    assert names_in(tmp_path) == {"target"}


@pytest.mark.parametrize("has_new", [False, True])
def test_a_swap_cut_off_between_its_renames_is_undone(tmp_path: Path, has_new: bool) -> None:
    """Killed there, nothing stands at the name itself."""
    (tmp_path / ".target.old").mkdir()
    (tmp_path / ".target.old" / "old").write_text("old")
    if has_new:
        (tmp_path / ".target.tmp").mkdir()
    assert files.put_back(tmp_path / "target")
    assert names_in(tmp_path / "target") == {"old"}
    assert not files.put_back(tmp_path / "target")

    with pytest.raises(KeyboardInterrupt), files.replaced(tmp_path / "target"):
        raise KeyboardInterrupt
    assert names_in(tmp_path) == {"target"} and names_in(tmp_path / "target") == {"old"}


def test_a_failing_block_puts_a_cut_off_swap_back_too(tmp_path: Path) -> None:
    (tmp_path / ".target.old").mkdir()
    (tmp_path / ".target.old" / "old").write_text("old")
    (tmp_path / ".target.lock").write_text("")
    with pytest.raises(KeyboardInterrupt), files.replaced(tmp_path / "target"):
        raise KeyboardInterrupt
    assert names_in(tmp_path) == {"target"} and names_in(tmp_path / "target") == {"old"}


def _replace_often(target: Path, writer: int, times: int) -> None:
    for number in range(times):
        with files.replaced(target) as fresh:
            for name in ("a", "b"):
                (fresh / name).write_text(f"{writer} {number}")


def test_processes_that_replace_one_folder_at_once_take_turns(tmp_path: Path) -> None:
    target, times = tmp_path / "target", 15
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_replace_often, args=(target, writer, times)) for writer in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert names_in(tmp_path) == {"target"} and names_in(target) == {"a", "b"}
    assert (target / "a").read_text() == (target / "b").read_text()
    assert (target / "a").read_text().endswith(f" {times - 1}")


def _count_up(counter: Path, times: int) -> None:
    for _ in range(times):
        with locks.locked(counter.with_name("lock")):
            counter.write_text(str(int(counter.read_text()) + 1))


def test_a_lock_lets_one_process_in_at_a_time(tmp_path: Path) -> None:
    """Without it two processes read the same number, and an increment is lost."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_count_up, args=(counter, 200)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert counter.read_text() == "600"
    assert names_in(tmp_path) == {"counter"}


# -- a full disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Limits the size of files, which the system answers as a full disk: in the middle of a write.

    Not to the end of a test: what pytest prints may go to a file too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


REFUSED = r"cannot write {}.*{} \(File too large\): make room there or make it writable, and the same command goes on"


def test_a_full_disk_during_an_append_leaves_whole_lines(run: RunFolder) -> None:
    run.append("train", train_line(1, loss=0.5))
    size = (run.path / "train.jsonl").stat().st_size
    # The next line would be cut after 10 bytes.
    with small_files(size + 10), pytest.raises(StorageError, match=REFUSED.format(run.path, r"train\.jsonl")):
        run.append("train", train_line(2, loss=0.25))
    assert (run.path / "train.jsonl").stat().st_size == size
    run.append("train", train_line(2, loss=0.25))
    assert run.lines("train") == [train_line(1, loss=0.5), train_line(2, loss=0.25)]


def test_a_full_disk_leaves_the_old_file(run: RunFolder) -> None:
    run.write_manifest(manifest())
    with small_files(20_000), pytest.raises(StorageError, match=REFUSED.format(run.path, r"manifest\.json")):
        run.update_manifest(note="x" * 30_000)
    with small_files(20_000), pytest.raises(StorageError, match=r"samples/step_00000004\.png \(File too large\)"):
        run.write_samples(4, np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8))
    assert run.manifest() == {"format": 2, **manifest()}
    assert names_in(run.path) == {"checkpoints", "samples", "manifest.json"} and not names_in(run.samples)


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with files.replaced(target) as fresh:
        (fresh / "old").write_text("old")
    refused = pytest.raises(StorageError, match=REFUSED.format(tmp_path, "target"))
    with small_files(1000), refused, files.replaced(target) as fresh:
        (fresh / "large").write_bytes(bytes(2000))
    assert names_in(tmp_path) == {"target"} and names_in(target) == {"old"}


def test_a_write_protected_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where a folder is wanted")
    for write in (
        lambda path: files.write_atomic(path, b"x"),
        lambda path: RunFolder(path.parent).append("eval", {}),
    ):
        with pytest.raises(StorageError, match=r"taken/\S+ \(Not a directory\)"):
            write(tmp_path / "taken" / "file")
    with pytest.raises(StorageError, match="taken/in/target"), files.replaced(tmp_path / "taken" / "in" / "target"):
        raise AssertionError("nothing may be written")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), files.replaced(tmp_path / "target"):
        (tmp_path / "missing").read_text()
