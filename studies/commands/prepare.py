"""`ditbench prepare`: caches ahead of time, by one process or several, and training of an autoencoder."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.config import RunConfig, require
from studies.configs.cells import comparison, run_config
from studies.configs.sections import nominal_shape, resolve_sections
from studies.configs.settings import build_parser, parse
from studies.terminal.quiet import quiet_libraries

if TYPE_CHECKING:
    from harness.frozen.autoencoder import AutoencoderRecipe
    from harness.method import Needs

CONTEXT = multiprocessing.get_context("spawn")
"""Makes the helpers: threads and CUDA do not survive a fork."""
UNITS = {"reading files": "files"}
"""What is counted in progress that does not count images."""


def main(argv: Sequence[str]) -> int:
    """Build the caches that a config's methods read, or train an autoencoder on its images."""
    quiet_libraries()
    parser = build_parser("prepare", "Build the caches of a config, or train an autoencoder on its data.")
    from harness.frozen.autoencoder import AutoencoderRecipe

    parser.add_argument("--train_autoencoder", action="store_true", help="train an autoencoder on the data instead")
    parser.add_argument("--out", type=str, default="", help="folder for the trained autoencoder")
    parser.add_class_arguments(AutoencoderRecipe, "recipe")
    parser.add_argument(
        "--jobs", type=int, default=0, help="processes that encode side by side; 0 = one a GPU, on the CPU one"
    )
    parser.add_argument("--verify", type=str, default="touched", help="full: check every shard of every cache")
    namespace = parse(parser, argv)
    require(namespace.verify in ("touched", "full"), f"--verify is {namespace.verify!r}: give touched or full")
    require(0 <= namespace.jobs <= 1024, f"--jobs is {namespace.jobs}: give 0 to 1024 processes")
    config = run_config(parser, namespace)
    if namespace.train_autoencoder:
        require(bool(namespace.out), "--out is empty: name the folder for the trained autoencoder")
        return _train_autoencoder(config, parser.instantiate(namespace).recipe, Path(namespace.out))
    cells = comparison(parser, namespace).cells if namespace.methods or namespace.cells else (config,)
    return _build_caches(cells, namespace.jobs, verify=namespace.verify == "full")


# -- caches ---------------------------------------------------------------------------------------------------------


def _build_caches(cells: Sequence[RunConfig], jobs: int, verify: bool) -> int:
    from harness.data.cache import cache_folder
    from harness.data.prepare import estimate, prepare
    from harness.machine import environment
    from harness.machine.disk import free_bytes, size_in_words
    from harness.method import Needs
    from studies.terminal.display import Display
    from studies.terminal.tables import console

    runtime = environment.resolve_runtime(cells[0].runtime)
    group = _Group.of(runtime.device, jobs)
    config = replace(cells[0], runtime=replace(runtime, threads=max(1, runtime.threads // group.size)))
    needs = Needs(encoders=tuple(dict.fromkeys(name for cell in cells for name in _needs(cell).encoders)))
    with Display() as display:
        sizes, folder = estimate(config, needs, display.report), cache_folder(config.output)
    listed = ", ".join(f"{kind} {size_in_words(size)}" for kind, size in sizes.items())
    console().print(
        f"caches in {folder} take {size_in_words(sum(sizes.values()))} in all ({listed}); "
        f"{size_in_words(free_bytes(folder))} of its disk are free"
    )
    environment.apply_runtime(config.runtime)
    with Display() as display, _helpers(config, needs, group):
        pace = _Pace(display.report)
        prepared = prepare(config, needs, group.device(0), pace.report)
        images, mirrored = prepared.images, prepared.mirrored
        opened = [images.images, prepared.moments, *prepared.tokens.values()]
        opened += [mirrored.moments, *mirrored.tokens.values()] if mirrored else []
        for cached in opened:
            if verify and hasattr(cached, "verify"):
                cached.verify(display.report)
    if pace.summary():
        console().print(pace.summary())
    checked = ", every shard checked" if verify else ""
    console().print(f"{len(images)} images of {images.num_classes} classes are ready{checked}")
    return 0


def _needs(config: RunConfig) -> "Needs":
    """What a cell's method reads, from an outline of it: nothing has to be encoded to know it."""
    import methods
    from harness.cost.memory import outline
    from harness.frozen.encoders import encoder_width
    from harness.method import DataShape

    shape = nominal_shape(config)
    data = DataShape(image_size=config.data.image_size, num_classes=shape.num_classes, encoder_width=encoder_width)
    config = resolve_sections(config, shape)
    return outline(config.method, lambda: methods.build(config, shape, data)).needs()


@dataclass(frozen=True)
class _Group:
    """The processes that make the caches together, and what each of them computes on."""

    kind: str
    """cpu, cuda or mps."""
    size: int
    """Processes on this machine."""
    started: int
    """Number of the processes that this one starts, itself included."""
    place: int
    """Number of this process, counted from 0."""

    @classmethod
    def of(cls, kind: str, jobs: int) -> "_Group":
        """The processes of a launcher such as torchrun; without one, as many as were asked for."""
        import torch

        size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            require(jobs in (0, 1), f"--jobs is {jobs}: a launcher has started {size} processes here, so leave it out")
            return cls(kind, size, 1, int(os.environ.get("LOCAL_RANK", "0")))
        num = jobs or (torch.cuda.device_count() if kind == "cuda" else 1)
        return cls(kind, num, num, 0)

    def device(self, number: int) -> str:
        """Device of the process that was started as number `number`: they take turns on the GPUs."""
        import torch

        return f"cuda:{(self.place + number) % torch.cuda.device_count()}" if self.kind == "cuda" else self.kind


@contextlib.contextmanager
def _helpers(config: RunConfig, needs: "Needs", group: _Group) -> Iterator[None]:
    """Processes that make the same caches during the block: each shard is made by the one that claims it first."""
    helpers = [
        CONTEXT.Process(target=_help, args=(config, needs, group.device(number)), daemon=True)
        for number in range(1, group.started)
    ]
    for helper in helpers:
        helper.start()
    try:
        yield
    finally:
        for helper in helpers:
            helper.terminate()
            helper.join()


def _help(config: RunConfig, needs: "Needs", device: str) -> None:
    """Make what is missing; what is wrong with the data or the disk is told by the process that started this one."""
    from harness.data.prepare import prepare
    from harness.errors import StorageError, UserError
    from harness.machine import environment

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the command alone answers it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by the way of `finally`: no half-written file stays
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet_libraries()
    environment.apply_runtime(config.runtime)
    try:
        prepare(config, needs, device)
    except (UserError, StorageError):
        sys.exit(1)


def _end_with_parent() -> None:
    """A command that was killed ends its helpers too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclass
class _Stage:
    """How far one cache or list of files is, from when it was first heard of."""

    start: float
    before: int
    now: float
    done: int
    unit: str

    @property
    def speed(self) -> str:
        """The speed of what all processes did in the meantime; empty for a stage that was told of once."""
        if self.done <= self.before:
            return ""
        rate = (self.done - self.before) / (self.now - self.start)
        return f"{rate:,.{0 if rate >= 10 else 1}f} {self.unit}/s"

    def left(self, total: int) -> str:
        """Time that the rest takes at this speed."""
        from studies.terminal.display import duration

        return duration((self.now - self.start) / (self.done - self.before) * (total - self.done))


@dataclass
class _Pace:
    """Adds speed and time left to progress: all processes' work counts, as all of it is in what is done."""

    tell: Callable[[str, int, int], None]
    stages: dict[str, _Stage] = field(default_factory=dict)

    def report(self, what: str, done: int, total: int) -> None:
        """A `harness.machine.progress.Report`."""
        now = time.monotonic()
        stage = self.stages.setdefault(what, _Stage(now, done, now, done, UNITS.get(what, "images")))
        stage.now, stage.done = now, done
        if stage.speed:
            what = f"{what}, {stage.speed}" + (f", {stage.left(total)} left" if done < total else "")
        self.tell(what, done, total)

    def summary(self) -> str:
        """The speed of every stage; empty where nothing was made."""
        return "; ".join(f"{what}: {stage.speed}" for what, stage in self.stages.items() if stage.speed)


# -- an autoencoder -------------------------------------------------------------------------------------------------


def _train_autoencoder(config: RunConfig, recipe: "AutoencoderRecipe", out: Path) -> int:
    from harness.data.cache import cache_folder
    from harness.data.image_set import split
    from harness.data.images import load_images
    from harness.machine import environment
    from harness.records.files import read_json
    from harness.training.autoencoder import train_autoencoder
    from studies.terminal.display import Display
    from studies.terminal.tables import console

    runtime = environment.resolve_runtime(config.runtime)
    environment.apply_runtime(runtime)
    with Display() as display:
        images = load_images(config.data, cache_folder(config.output), display.report)
        rows, _ = split(len(images), config.data.holdout, config.data.split_seed)
        train_autoencoder(images, rows, out, recipe, environment.resolve_device(runtime.device), display.report)
    facts = read_json(out / "recipe.json")
    console().print(f"{out}: held-out error {facts['held_out_error']:.3g}, sha256 {facts['weights_sha256']}")
    return 0
