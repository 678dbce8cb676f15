"""`ditbench sample`: generate images from a run."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.config import require
from harness.errors import UserError
from harness.records import replaced
from studies import saved
from studies.commands.common import quiet_libraries


def main(argv: Sequence[str]) -> int:
    """Write images as PNG files into a folder, or as one .npz with `arr_0` (uint8 NHWC, as ADM's evaluator reads)."""
    quiet_libraries()
    parser = saved.build_parser("sample", "Generate images; image i depends on --evaluation.seed and on i alone.")
    parser.add_argument("--num", type=int, default=100, help="images; labels are balanced by index")
    parser.add_argument("--out", type=str, default="samples", help="a folder that does not exist yet, or a .npz file")
    namespace, folder = saved.parse(parser, argv)
    require(namespace.num >= 1, f"--num is {namespace.num}: give 1 or more images")
    out = Path(namespace.out)
    require(not out.exists(), f"--out {out} exists already: name another place")
    from harness.generate import generate
    from studies.display import Display
    from studies.run import open_lab
    from studies.tables import console

    with Display() as display:
        config = saved.recorded_config(folder, parser, namespace)
        lab = open_lab(config, display.report)
        backbone, step = saved.load_backbone(folder, lab, namespace.step)
        parts = []
        evaluation, device = lab.config.evaluation, lab.accelerator.device
        for start, images in generate(backbone, lab.prepared.autoencoder, evaluation, namespace.num, device):
            parts.append(images)
            display.report("images", start + len(images), namespace.num)
    write_images(out, np.concatenate(parts))
    console().print(f"{namespace.num} images of step {step} in {out}")
    return 0


def write_images(out: Path, images_NHWC: np.ndarray) -> None:
    """Write a .npz file, or a folder of PNG files 000000.png, ..., whole or not at all."""
    write = _write_npz if out.suffix == ".npz" else _write_folder
    try:
        write(out, images_NHWC)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror}): name a place you may write to") from None


def _write_npz(out: Path, images_NHWC: np.ndarray) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with temporary.open("wb") as file:
            np.savez(file, arr_0=images_NHWC)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


def _write_folder(out: Path, images_NHWC: np.ndarray) -> None:
    from PIL import Image

    with replaced(out) as temporary:
        for index, image in enumerate(images_NHWC):
            Image.fromarray(image).save(temporary / f"{index:06d}.png")
