"""What was checked to agree before anything was compared."""

from collections.abc import Sequence

from reports.sections import Part, Section, Table
from reports.study.load import Study
from reports.study.verify import Check, verify
from reports.tables.cells import Cell, Row


def section(shown: Study) -> Section:
    """A row for every check; the files hold whole digests."""
    return Section(
        name="checks",
        title="Checked to agree",
        short="Checks",
        sentences=["A study in which one of these differed would not have been reported."],
        parts=[Part(_table(verify(shown.whole)))],
    )


def _table(checks: Sequence[Check]) -> Table:
    rows: list[Row] = [
        {
            "what": check.what,
            "where": check.scope,
            "runs": Cell(str(check.num_runs), check.num_runs),
            "shared value": check.short if check.value else "nothing to compare yet",
        }
        for check in checks
    ]
    return Table("checks", "", rows, forms=("csv", "json"), beside="with whole digests")
