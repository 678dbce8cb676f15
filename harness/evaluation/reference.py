"""What generated images are compared with: the training images, a folder of images, or an ADM reference batch.

An ADM reference batch is a .npz with the statistics of Inception's features over a whole data set, `mu` and `sigma`
(`mu_s` and `sigma_s` for sFID), and possibly some of its images as `arr_0` (openai/guided-diffusion evaluations).

Shapes: M images of the reference, H W image height and width in pixels, F features.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harness.data import cache as caches
from harness.data.pictures import EXTENSIONS, PICTURE_TRANSFORM, read_image
from harness.errors import UserError
from harness.evaluation.extractors import Extractor
from harness.evaluation.fidelity import Pictures, Statistics
from harness.evaluation.samples_file import IMAGES, read_array, read_images
from harness.machine.progress import OnProgress
from harness.records.files import digest, file_digest

KEY = "evaluation.reference"
STATISTICS = {"fd": ("mu", "sigma"), "sfd": ("mu_s", "sigma_s")}
"""Names in the .npz, by the Frechet distance that they serve."""


@dataclass(frozen=True, kw_only=True)
class ReferenceImages:
    """A reference before any feature of it is computed."""

    num: int
    """M; 0 where statistics alone are known."""
    get: Callable[[int], np.ndarray]
    """Image i, uint8 [H, W, 3]."""
    digest: Any
    """Changes with any image or number of it; stands in the evaluation protocol."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """Given statistics of Frechet distances, by the distance's name."""

    @property
    def pictures(self) -> Pictures | None:
        """Its images, as extractors want them."""
        return Pictures(self.get, self.num) if self.num else None


def open_reference(
    path: Path, extractor: Extractor, image_size: int, cache: Path, on_progress: OnProgress | None
) -> ReferenceImages:
    """Open a folder of images, which are cut to squares of `image_size` as training images are, or an ADM batch.

    Raises:
        UserError: for what is neither, or does not fit the extractor.
    """
    if path.is_dir():
        return _open_folder(path, image_size, cache, on_progress)
    source = _open_batch(path)
    for kind, stored in source.statistics.items():
        width = {"fd": extractor.width, "sfd": extractor.spatial_width}[kind]
        shapes = tuple(value.shape for value in stored.values())
        if width and shapes != ((width,), (width, width)):
            names = " and ".join(STATISTICS[kind])
            raise UserError(
                f"{KEY}: {names} of {path} are {shapes[0]} and {shapes[1]}, and evaluation.extractor "
                f"{extractor.label} gives {width} features: give the file or the extractor that belongs to it"
            )
    return source


def _open_batch(path: Path) -> ReferenceImages:
    found = {}
    for kind, names in STATISTICS.items():
        values = {key: read_array(path, name, KEY) for key, name in zip(("mu", "sigma"), names, strict=True)}
        stored = {key: np.array(value, np.float64) for key, value in values.items() if value is not None}
        if len(stored) == len(values):
            if not all(np.isfinite(value).all() for value in stored.values()):
                raise UserError(f"{KEY}: {' or '.join(names)} of {path} is not finite: replace it")
            found[kind] = stored
    if read_array(path, IMAGES, KEY) is not None:
        images = read_images(path, KEY)
        return ReferenceImages(num=images.num, get=images.get, digest=images.digest, statistics=found)
    if "fd" not in found:
        raise UserError(f"{KEY}: {path} has neither mu and sigma nor {IMAGES}: give a reference batch in ADM's layout")
    return ReferenceImages(num=0, get=_no_image, digest=file_digest(path), statistics=found)


def _no_image(index: int) -> np.ndarray:
    raise AssertionError(f"image {index} of a reference that has statistics alone")


def _open_folder(root: Path, image_size: int, cache: Path, on_progress: OnProgress | None) -> ReferenceImages:
    names = sorted(
        (Path(folder) / file).relative_to(root).as_posix()
        for folder, _, files in os.walk(root)
        for file in files
        if not file.startswith(".") and Path(file).suffix.lower() in EXTENSIONS
    )
    if not names:
        raise UserError(f"{KEY}: {root} holds no images ({', '.join(sorted(EXTENSIONS))}): name another folder")
    files = _content(root, names, cache, on_progress)
    return ReferenceImages(
        num=len(names),
        get=lambda index: _read_image(root / names[index], image_size),
        digest=digest({"files": files, "transform": PICTURE_TRANSFORM, "image_size": image_size}),
    )


def _read_image(path: Path, image_size: int) -> np.ndarray:
    try:
        return read_image(path, image_size)
    except UserError as error:
        raise UserError(str(error).replace("data.path", KEY, 1)) from error


def _content(root: Path, names: list[str], cache: Path, on_progress: OnProgress | None) -> str:
    """Digest of names and contents; read again only when a file's size or modification time is another one."""
    try:
        states = [[name, (root / name).stat().st_size, (root / name).stat().st_mtime_ns] for name in names]
        kept = cache / f"reference-{digest(str(root.resolve()))[:12]}.json"
        stored = caches.read_small(kept, on_progress)
        if stored and stored["states"] == states:
            return stored["content"]
        content = digest([[name, file_digest(root / name)] for name in names])
    except OSError as error:
        raise UserError(f"{KEY}: cannot read {error.filename} ({error.strerror}): make it readable") from None
    caches.write_small(kept, {"states": states, "content": content})
    return content
