"""The machines and versions that the runs had, and the runs that differ in them."""

from reports.sections import Part, Section, Table
from reports.study.load import Study
from reports.study.verify import EnvironmentFact, environment
from reports.tables.cells import Cell, Row


def section(shown: Study) -> Section:
    """A row for every fact."""
    rows = [_row(fact) for fact in environment(shown.whole)]
    parts = [Part(Table("", "", rows, kind="settings"))] if rows else []
    return Section(name="environment", title="Environment", parts=parts)


def _row(fact: EnvironmentFact) -> Row:
    if not fact.differs:
        return {"setting": fact.name, "value": next(iter(fact.values))}
    lines = [line for value, runs in fact.values.items() for line in (value, ", ".join(runs))]
    return {"setting": Cell(fact.name, mark="differs"), "value": Cell("; ".join(lines), mark="differs", lines=lines)}
