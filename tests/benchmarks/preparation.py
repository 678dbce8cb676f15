"""What `ditbench prepare` takes: memory over the number of images, and speed over the number of processes.

Random PNG pictures of 32 pixels in class folders give images, moments of the packaged autoencoder and, but for the
largest folder, tokens of efficientnet_lite0. `peak_mb` is the most memory that the command itself held at once (VmHWM),
`over_start_mb` that above the same command on the first 64 images, which holds the same libraries and networks.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.data.cache import ROWS_PER_CALL

TITLE = "`ditbench prepare` of pictures of 32 pixels: memory and speed"
SIDE, CLASSES = 32, 10
CASES = (
    *((2000, 1, 2, True), (10000, 1, 2, True), (30000, 1, 1, True), (30000, 2, 2, True)),
    *((50000, 1, 1, False), (50000, 2, 2, False)),
)
"""Images, processes, threads of all of them (one process on all, or one on each), and whether tokens are made."""
ENCODER = "efficientnet_lite0"
COMMAND = """
import sys
from pathlib import Path
from studies import cli

if __name__ == "__main__":
    code = cli.main(sys.argv[1:])
    print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
    sys.exit(code)
"""


def write_images(folder: Path, num_images: int) -> Path:
    """Noise in class folders, unless they are there; image i is the same in every folder."""
    if folder.exists():
        return folder

    def write(number: int) -> None:
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / str(number % CLASSES) / f"{number:06d}.png", compress_level=1)

    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(write, range(num_images)))
    return folder


def prepare(images: Path, scratch: Path, jobs: int, threads: int, with_tokens: bool = True) -> tuple[str, float]:
    """What the command prints, and its seconds; the caches are removed."""
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        program, cache = Path(temporary) / "program.py", Path(temporary) / "cache"
        program.write_text(COMMAND)
        data = ["--data.name", "imagefolder", "--data.path", str(images), "--data.image_size", str(SIDE)]
        method = ["--model.name", "SiT-pico/2", "--method", "sit"]
        if with_tokens:
            method[-1:] = ["repa", "--repa.encoders", ENCODER]
        shared = ["--jobs", str(jobs), "--runtime.threads", str(threads)]
        words = ["prepare", *data, *method, *shared, "--output.cache", str(cache)]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(program), *words],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        return done.stdout, time.perf_counter() - started


def peak_mb(printed: str) -> float:
    """Of the line that the system keeps in kB."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", printed)[0]) / 1e3


def speed(printed: str, kind: str) -> float | None:
    """Images/s of one cache, as the command gives it at its end; None for one that was not made."""
    found = re.findall(rf"{kind}-[0-9a-f]{{12}} \([^)]*\): ([\d,.]+) images/s", printed)
    return float(found[-1].replace(",", "")) if found else None


def measure_case(
    num_images: int, jobs: int, threads: int, with_tokens: bool, start_mb: float, scratch: Path
) -> dict[str, Any]:
    images = write_images(scratch / str(num_images), num_images)
    printed, seconds = prepare(images, scratch, jobs, threads, with_tokens)
    peak = peak_mb(printed)
    speeds = {f"{kind}_per_s": speed(printed, kind) for kind in ("images", "moments", f"tokens-{ENCODER}")}
    return {
        "images": num_images,
        "processes": jobs,
        "threads": threads,
        "seconds": seconds,
        **speeds,
        "peak_mb": peak,
        "over_start_mb": peak - start_mb,
    }


def measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        start_mb = peak_mb(prepare(write_images(scratch / "start", ROWS_PER_CALL), scratch, 1, 2)[0])
        return [measure_case(*case, start_mb, scratch) for case in CASES]
