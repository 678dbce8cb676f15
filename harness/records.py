"""Records: what a run leaves behind, and how reports read it. Free of torch and pandas.

A run folder `runs/<study>/<cell>/seed<k>/` holds `manifest.json` (resolved config, digests, environment, status),
`train.jsonl`, `eval.jsonl`, `final.jsonl`, `cost.json`, `checkpoints/` and `samples/`. These files are the source of
truth; MLflow and the report are views of them.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, get_args

from harness.errors import StorageError, UserError

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

FORMAT = 1
"""Version of the record files; raised when a reader of an older version would misread them."""

Status = Literal["running", "finished", "diverged", "pruned", "failed"]

RecordName = Literal["train", "eval", "final"]
"""What a file of records holds: training at logged steps, evaluations at the points, the evaluation at the end under a
protocol of its own."""

Spacing = Literal["even", "doubling"]
"""How evaluation points lie in the budget."""

ABLATION_RECORD = "ablation.json"
"""In the folder of a study that is an ablation: all that is known of it besides its runs."""


@functools.cache
def point_share(point: int, points: int, spacing: Spacing) -> Fraction:
    """Share of the budget, in (0, 1], at which evaluation point `point` of 1 to `points` lies.

    Evenly spaced points are i/n of the budget; doubling ones lie at half of the next, as in tables over 50K, 100K,
    200K and 400K steps. The last is the end of the budget in both.
    """
    return Fraction(1, 2 ** (points - point)) if spacing == "doubling" else Fraction(point, points)


# -- metrics --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """How a metric is read. `direction` is the better one: `lower` or `higher`.

    `on_features` says whether it is computed on an extractor's features, and so may favour a method that was trained
    towards features of the same family.
    """

    prefix: str
    title: str
    direction: Literal["lower", "higher"]
    on_features: bool = True


METRICS = (
    Metric("fid", "FID", "lower"),
    Metric("kid", "KID", "lower"),
    Metric("sfid", "sFID", "lower"),
    Metric("is", "Inception score", "higher"),
    Metric("fd_pixels", "FD on pixels", "lower", on_features=False),
    Metric("fd", "Fréchet distance", "lower"),
    Metric("kd", "Kernel distance", "lower"),
    Metric("sfd", "Spatial Fréchet distance", "lower"),
    Metric("precision", "Precision", "higher"),
    Metric("recall", "Recall", "higher"),
    Metric("class_accuracy", "Asked class named", "higher", on_features=False),
    Metric("velocity_loss", "Held-out velocity loss", "lower", on_features=False),
)
"""Every metric family, its direction declared here and nowhere else. The longest matching prefix counts."""


def metric(name: str) -> Metric:
    """The family of a metric name such as `fd_efficientnet_lite0_898` or `fid50k`."""
    found = [m for m in METRICS if name.startswith(m.prefix)]
    if not found:
        raise UserError(f"metric {name!r} is not known: metrics begin with {', '.join(m.prefix for m in METRICS)}")
    return max(found, key=lambda m: len(m.prefix))


METRIC_ORDER = (
    *("fid", "fd", "sfid", "sfd", "kid", "kd", "is"),
    *("class_accuracy", "velocity_loss", "fd_pixels", "precision", "recall"),
)
"""Families of metrics in the order in which they are shown; the first one recorded is the main metric."""


def metric_rank(name: str) -> tuple[int, str]:
    """Sorts metric names in the order in which they are shown."""
    family = metric(name).prefix
    return (METRIC_ORDER.index(family) if family in METRIC_ORDER else len(METRIC_ORDER)), name


def main_metric(names: Iterable[str]) -> str:
    """The metric that stands for a result: the first in the order, of at least one."""
    return min(names, key=metric_rank)


def count_name(num: int) -> str:
    """N as it stands in metric names: 50000 -> 50k, 898 -> 898."""
    return f"{num // 1000}k" if num >= 1000 and num % 1000 == 0 else str(num)


# -- digests and files ----------------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """JSON with sorted keys and without blanks: equal values give equal text. Non-finite floats become strings."""
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, as 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """JSON has no NaN: non-finite floats travel as the strings nan, inf and -inf."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    return value


def number(value: float | str) -> float:
    """A recorded number: undoes what `_plain` did to non-finite floats."""
    return float(value)


DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)
)
"""What a full, broken or write-protected disk answers."""


@contextlib.contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn what the disk answers to a write of `path` into a `StorageError`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise StorageError(error.errno, error.strerror, str(path)) from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: temporary name, sync, rename. `StorageError` when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storing(path):
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, readable by people."""
    text = json.dumps(_plain(value), indent=1, sort_keys=True, allow_nan=False)
    write_atomic(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; `UserError` names the file when it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing: is this a run folder of ditbench?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): remove the folder and run the cell again") from None


# -- the run folder -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFolder:
    """One run's folder. Lines are appended whole; `truncate` drops those after a step before a run continues."""

    path: Path

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    def create(self) -> None:
        """Make the folder; `UserError` when it cannot be written to."""
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"output.runs: cannot write to {self.path} ({error.strerror}): name a folder you may write to"
            ) from None

    def exists(self) -> bool:
        return self.manifest_path.is_file()

    def manifest(self) -> dict[str, Any]:
        return read_json(self.manifest_path)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        write_json(self.manifest_path, {"format": FORMAT, **manifest})

    def update_manifest(self, **fields: Any) -> None:
        """Replace top-level fields of the manifest, atomically."""
        self.write_manifest({**self.manifest(), **fields})

    def status(self) -> Status | None:
        """Status of the run, or None when it has not begun."""
        return self.manifest()["status"] if self.exists() else None

    def append(self, name: RecordName, record: Mapping[str, Any]) -> None:
        """Append one record as one line to `<name>.jsonl`, whole or not at all, and sync it; `StorageError` if full."""
        path = self.path / f"{name}.jsonl"
        # Unbuffered: a buffer would be written once more when the file is closed, behind the end of what was undone.
        with storing(path), path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                rest = (canonical(record) + "\n").encode()
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(start)
                raise

    def lines(self, name: RecordName, stride: int = 1) -> list[dict[str, Any]]:
        """All whole records of `<name>.jsonl`, oldest first; a last line cut short by a crash is left out.

        With a stride only those of steps that are multiples of it, and the last; the others are not even parsed.
        `UserError` names a line that is damaged.
        """
        path = self.path / f"{name}.jsonl"
        if not path.is_file():
            return []
        *whole, _ = path.read_bytes().split(b"\n")
        numbered = list(enumerate(whole, start=1))
        if stride > 1:
            numbered = [*(each for each in numbered[:-1] if _step(each[1]) % stride == 0), *numbered[-1:]]
        return [_record(line, f"{path}, line {number}") for number, line in numbered]

    def num_lines(self, name: RecordName) -> int:
        """Whole records of `<name>.jsonl`."""
        path = self.path / f"{name}.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def all_lines(self) -> Iterator[tuple[RecordName, dict[str, Any]]]:
        """All whole records with the kind of each: training, then evaluations, then the one at the end."""
        for name in get_args(RecordName):
            yield from ((name, line) for line in self.lines(name))

    def truncate(self, step: int) -> None:
        """Drop records after `step`, so that a continued run does not write a point twice, and half-written files."""
        for leftover in (*self.path.glob(".*.tmp"), *self.samples.glob(".*.tmp")):
            leftover.unlink()
        for name in get_args(RecordName):
            path = self.path / f"{name}.jsonl"
            if path.is_file():
                kept = [canonical(record) + "\n" for record in self.lines(name) if record["step"] <= step]
                write_atomic(path, "".join(kept).encode())

    def write_samples(self, step: int, images_NHWC: "np.ndarray", name: str = "step") -> Path:
        """Write uint8 images [N, H, W, 3] as one PNG of square tiles, `TILES_A_ROW` a row, image 0 top left."""
        path = self.samples / f"{name}_{step:08d}.png"
        buffer = io.BytesIO()
        tile_picture(images_NHWC).save(buffer, format="PNG")
        write_atomic(path, buffer.getvalue())
        return path


def _step(line: bytes) -> int:
    """The step of a record that was not parsed, 0 where it is not to be found. Keys are sorted, so that what may have
    a number named `step` within it stands before the record's own.
    """
    found = re.findall(rb'"step": ?(\d+)', line)
    return int(found[-1]) if found else 0


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{where}, is damaged: remove the folder and run the cell again")
    return record


TILES_A_ROW = 10
"""Images in a row of a sample picture."""


def tile_picture(images_NHWC: "np.ndarray") -> "Image":
    """A Pillow image of the tiles; missing places of the last row are white."""
    import numpy as np
    from PIL import Image

    num, height, width, _ = images_NHWC.shape
    rows = -(-num // TILES_A_ROW)
    sheet = np.full((rows * TILES_A_ROW, height, width, 3), 255, dtype=np.uint8)
    sheet[:num] = images_NHWC
    grid = sheet.reshape(rows, TILES_A_ROW, height, width, 3).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(grid.reshape(rows * height, TILES_A_ROW * width, 3))


def find_runs(study: Path) -> list[RunFolder]:
    """All run folders of a study, sorted by cell and seed; `UserError` when there are none."""
    manifests = [path for path in study.glob("*/seed*/manifest.json") if re.fullmatch(r"seed\d+", path.parent.name)]
    found = [RunFolder(path.parent) for path in manifests]
    if not found:
        raise UserError(f"{study} holds no runs: name a study folder such as runs/digits, or train one first")
    return sorted(found, key=lambda run: (run.path.parent.name, seed_of(run)))


def seed_of(run: RunFolder) -> int:
    """The seed, from the folder's name."""
    return int(run.path.name.removeprefix("seed"))


def run_path(runs: str | Path, study: str, cell: str, seed: int) -> Path:
    """Where a run lives."""
    return Path(runs) / study / cell / f"seed{seed}"


def is_open(file: IO[Any], path: Path) -> bool:
    """Whether `file` is what lies at `path`, which another process may have removed or replaced since."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def locked(path: Path, waits: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` during the block, while other processes wait for it; it is gone afterwards.

    Without `waits`, the block runs at once, and is told whether the lock is held or another process has it.
    """
    while True:
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Its last holder may have removed the file that was opened here, which then locks nothing.
            if not is_open(lock, path):
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A fresh temporary folder that takes the place of `path` when the block ends without an error.

    Killed at any moment, it leaves the old folder or the new one whole; between the two renames the old one has a
    hidden name, which `put_back` undoes and so does the next call. Processes that replace one folder at once do so
    one after another. `StorageError` when the disk refuses.
    """
    temporary, old = path.with_name(f".{path.name}.tmp"), _old(path)
    with storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            put_back(path)
            for leftover in (temporary, old):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                sync_tree(temporary)
                if path.exists():
                    path.rename(old)
                temporary.rename(path)
            except BaseException:
                put_back(path)
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            sync_path(path.parent)
            shutil.rmtree(old, ignore_errors=True)


def put_back(path: Path) -> bool:
    """Undo a replacement that was cut off between its two renames; says whether there was one."""
    old = _old(path)
    if path.exists() or not old.exists():
        return False
    old.rename(path)
    return True


def _old(path: Path) -> Path:
    """Where a folder stands while another takes its place."""
    return path.with_name(f".{path.name}.old")


def sync_tree(folder: Path) -> None:
    """Flush every file of a folder, and the folder, to the disk."""
    paths: Iterable[Path] = [*folder.rglob("*"), folder]
    for path in paths:
        sync_path(path)


def sync_path(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
