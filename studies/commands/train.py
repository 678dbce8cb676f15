"""`ditbench train`: one method at one seed."""

from collections.abc import Sequence

from studies.commands.common import is_main_process, print_config
from studies.configs.cells import Comparison, run_config
from studies.configs.settings import build_parser, parse
from studies.costs import dry_run
from studies.terminal.quiet import quiet_libraries


def main(argv: Sequence[str]) -> int:
    """Train one run; the same command again continues it."""
    quiet_libraries()
    parser = build_parser("train", "Train one method at one seed. The same command again goes on.")
    dry_run.add_options(parser)
    namespace = parse(parser, [word for word in argv if word != "--print_config"])
    config = run_config(parser, namespace)
    if "--print_config" in argv:
        return print_config([config])
    if dry_run.is_asked(namespace):
        return dry_run.show([(config, 1)], namespace)
    from studies.dispatch.execute import run_here
    from studies.terminal.tables import console

    failures = run_here(Comparison(cells=(config,), seeds=(config.seed,), baseline=""))
    for failure in failures if is_main_process() else ():
        console(stderr=True).print(f"failed: {failure.run}: {failure.message}")
    return 1 if failures else 0
