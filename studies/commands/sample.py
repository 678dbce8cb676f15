"""`ditbench sample`: generate images from a run or a released checkpoint."""

from collections.abc import Sequence
from pathlib import Path

from harness.config import require
from studies.commands.common import is_main_process
from studies.terminal.quiet import quiet_libraries

DESCRIPTION = (
    "Generate images; image i depends on --evaluation.seed and on i alone. For a released checkpoint give --checkpoint "
    "FILE --source repa|sra|sit --config CONFIG."
)


def main(argv: Sequence[str]) -> int:
    """Write images as PNG files, or as one .npz as ADM's evaluator reads it; the same command again goes on."""
    quiet_libraries()
    from studies.runs import released, saved

    is_released, words = released.route(argv)
    source = released if is_released else saved
    parser = source.build_parser("sample", DESCRIPTION)
    saved.add_protocol(parser)
    # torchrun and accelerate launch take --num for a short form of options of theirs.
    number = "images; labels are balanced by index (under a launcher write --num_images)"
    parser.add_argument("--num", "--num_images", type=int, default=100, help=number)
    parser.add_argument("--out", type=str, default="samples", help="a folder that does not exist yet, for PNG files")
    parser.add_argument("--npz", type=str, default="", help="a .npz file instead: arr_0 uint8 NHWC, arr_1 labels")
    namespace, opening = source.parse_to_open(parser, words)
    require(namespace.num >= 1, f"--num is {namespace.num}: give 1 or more images")
    out = Path(namespace.npz or namespace.out)
    require(not out.exists(), f"--out {out} exists already: name another place")
    from studies.terminal.display import Display
    from studies.terminal.tables import console

    with Display() as display:
        opened = opening(display.report)
        is_npz = bool(namespace.npz) or out.suffix == ".npz"
        bad_images = saved.write_samples(opened.lab, opened.backbone, namespace.num, out, is_npz)
    console().print(f"{namespace.num} images of {opened.title} in {out}")
    if bad_images and is_main_process():
        console(stderr=True).print(f"warning: {bad_images} of the images come from latents with NaN or infinity")
    return 0
