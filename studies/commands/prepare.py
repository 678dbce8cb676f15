"""`ditbench prepare`: caches ahead of time, and training of an autoencoder."""

from collections.abc import Sequence
from pathlib import Path

from harness.config import require
from studies.commands.common import quiet_libraries
from studies.settings import build_parser, comparison, parse, run_config


def main(argv: Sequence[str]) -> int:
    """Build the caches that a config's methods read, or train an autoencoder on its images."""
    quiet_libraries()
    parser = build_parser("prepare", "Build the caches of a config, or train an autoencoder on its data.")
    from harness.autoencoder import AutoencoderRecipe

    parser.add_argument("--train_autoencoder", action="store_true", help="train an autoencoder on the data instead")
    parser.add_argument("--out", type=str, default="", help="folder for the trained autoencoder")
    parser.add_class_arguments(AutoencoderRecipe, "recipe")
    parser.add_argument("--verify", type=str, default="touched", help="full: check every shard of every cache")
    namespace = parse(parser, argv)
    require(namespace.verify in ("touched", "full"), f"--verify is {namespace.verify!r}: give touched or full")
    config = run_config(parser, namespace)
    if namespace.train_autoencoder:
        require(bool(namespace.out), "--out is empty: name the folder for the trained autoencoder")
        return _train_autoencoder(config, parser.instantiate(namespace).recipe, Path(namespace.out))
    cells = comparison(parser, namespace).cells if namespace.methods or namespace.cells else (config,)
    return _build_caches(cells, verify=namespace.verify == "full")


def _build_caches(cells: Sequence, verify: bool) -> int:
    from harness.cache import Sharded
    from harness.prepare import prepare
    from studies.display import Display
    from studies.run import build_method, open_lab, resolve_run
    from studies.tables import console

    with Display() as display:
        lab = open_lab(cells[0], display.report)
        for cell in cells:
            needs = build_method(lab, resolve_run(lab, cell)).needs()
            prepared = prepare(lab.config, needs, lab.accelerator.device, display.report)
            for cached in (prepared.images.images, prepared.moments, *prepared.tokens.values()):
                if verify and isinstance(cached, Sharded):
                    cached.verify()
    checked = ", every shard checked" if verify else ""
    console().print(
        f"{len(lab.prepared.images)} images of {lab.prepared.images.num_classes} classes are ready{checked}"
    )
    return 0


def _train_autoencoder(config, recipe, out: Path) -> int:
    from harness import environment
    from harness.autoencoder import train_autoencoder
    from harness.cache import cache_folder
    from harness.data import load_images, split
    from harness.records import read_json
    from studies.display import Display
    from studies.tables import console

    runtime = environment.resolve_runtime(config.runtime)
    environment.apply_runtime(runtime)
    with Display() as display:
        images = load_images(config.data, cache_folder(config.output), display.report)
        rows, _ = split(len(images), config.data.holdout, config.data.split_seed)
        train_autoencoder(images, rows, out, recipe, environment.resolve_device(runtime.device), display.report)
    facts = read_json(out / "recipe.json")
    console().print(f"{out}: held-out error {facts['held_out_error']:.3g}, sha256 {facts['weights_sha256']}")
    return 0
