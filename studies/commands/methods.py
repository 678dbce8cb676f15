"""`ditbench methods`: the methods there are."""

import json
from collections.abc import Sequence

from studies.commands.common import Parser
from studies.terminal.quiet import quiet_libraries


def main(argv: Sequence[str]) -> int:
    """List every discovered method with what it adds, needs and cites."""
    parser = Parser(prog="ditbench methods", description="List the methods there are.")
    parser.add_argument("--format", choices=("table", "json"), default="table", help="table (default) or json")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    import methods
    from studies.terminal.tables import print_table

    rows = []
    for name in methods.names():
        disclosure = methods.load(name).disclosure
        rows.append({"method": name, "adds": disclosure.summary, "source": disclosure.paper, "note": disclosure.note})
    if arguments.format == "json":
        print(json.dumps(rows, indent=1, ensure_ascii=False))
    else:
        print_table(rows, justify="left")
    return 0
