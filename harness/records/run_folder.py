"""Records: what a run leaves behind, and how reports read it. Free of torch and pandas.

A run folder `runs/<study>/<cell>/seed<k>/` holds `manifest.json` (resolved config, digests, environment, status),
`train.jsonl`, `eval.jsonl`, `final.jsonl`, `cost.json`, `checkpoints/` and `samples/`. These files are the source of
truth; MLflow and the report are views of them.
"""

import functools
import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args, overload

from harness.errors import UserError
from harness.records.files import canonical, storing, write_atomic, write_json
from harness.records.schema import (
    FORMAT,
    CostRecord,
    EvalRecord,
    FinalRecord,
    Manifest,
    RecordName,
    Spacing,
    Status,
    TrainRecord,
    parse_line,
    read_record,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

LineRecord: TypeAlias = TrainRecord | EvalRecord | FinalRecord

KINDS: Mapping[RecordName, type[TrainRecord] | type[EvalRecord] | type[FinalRecord]] = {
    "train": TrainRecord,
    "eval": EvalRecord,
    "final": FinalRecord,
}
"""The type of the lines of every file."""


@functools.cache
def point_share(point: int, points: int, spacing: Spacing) -> Fraction:
    """Share of the budget, in (0, 1], at which evaluation point `point` of 1 to `points` lies.

    Evenly spaced points are i/n of the budget; doubling ones lie at half of the next, as in tables over 50K, 100K,
    200K and 400K steps. The last is the end of the budget in both.
    """
    return Fraction(1, 2 ** (points - point)) if spacing == "doubling" else Fraction(point, points)


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

    def manifest(self) -> Manifest:
        """What the run is; `UserError` names a field that is missing or wrong."""
        return read_record(self.manifest_path, Manifest)

    def write_manifest(self, manifest: Mapping[str, object]) -> None:
        write_json(self.manifest_path, {"format": FORMAT, **manifest})

    def update_manifest(self, **fields: object) -> None:
        """Replace top-level fields of the manifest, atomically."""
        self.write_manifest({**self.manifest(), **fields})

    def status(self) -> Status | None:
        """Status of the run, or None when it has not begun."""
        return self.manifest()["status"] if self.exists() else None

    @property
    def cost_path(self) -> Path:
        return self.path / "cost.json"

    def cost(self) -> CostRecord:
        """What the run costs, counted; empty where it did not get that far."""
        return read_record(self.cost_path, CostRecord) if self.cost_path.is_file() else {}

    def append(self, name: RecordName, record: Mapping[str, object]) -> None:
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

    @overload
    def lines(self, name: Literal["train"], stride: int = 1) -> list[TrainRecord]: ...
    @overload
    def lines(self, name: Literal["eval"], stride: int = 1) -> list[EvalRecord]: ...
    @overload
    def lines(self, name: Literal["final"], stride: int = 1) -> list[FinalRecord]: ...
    @overload
    def lines(self, name: RecordName, stride: int = 1) -> list[LineRecord]: ...
    def lines(self, name: RecordName, stride: int = 1) -> Sequence[LineRecord]:
        """All whole records of `<name>.jsonl`, oldest first; a last line cut short by a crash is left out.

        With a stride only those of steps that are multiples of it, and the last; the others are not even parsed.
        `UserError` names a line that is damaged, and a field of it that is missing or wrong.
        """
        path = self.path / f"{name}.jsonl"
        if not path.is_file():
            return []
        *whole, _ = path.read_bytes().split(b"\n")
        numbered = list(enumerate(whole, start=1))
        if stride > 1:
            numbered = [*(each for each in numbered[:-1] if _step(each[1]) % stride == 0), *numbered[-1:]]
        kind = KINDS[name]
        return [parse_line(line, kind, f"{path}, line {number}") for number, line in numbered]

    def num_lines(self, name: RecordName) -> int:
        """Whole records of `<name>.jsonl`."""
        path = self.path / f"{name}.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def all_lines(self) -> Iterator[tuple[RecordName, LineRecord]]:
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
