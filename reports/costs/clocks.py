"""The main metric against the clocks that the budget does not count, and at equal cost."""

import dataclasses
from functools import partial

from reports.costs import equal_cost
from reports.figures.curves import clock_curves
from reports.figures.lines import bands_remark, clocks_figure, stops_remark
from reports.figures.plans import Plan
from reports.sections import Part, Section, TableFile
from reports.study.load import Study
from reports.study.units import UNITS
from reports.study.words import listed, with_all


def section(shown: Study) -> Section:
    """Curves of the shown cells, and their values where all cells have spent the same; files hold all cells."""
    study = shown.whole
    found = equal_cost.equal_costs(study)
    tables = [equal_cost.table(study, equal) for equal in found]
    narrowed = [
        dataclasses.replace(
            table,
            rows=[row for row in table.rows if row["cell"] in shown.cells],
            stem=equal_cost.STEM if table is tables[-1] else "",
            beside=with_all(len(study.cells), len(shown.cells)),
        )
        for table in tables
    ]
    titled = [dataclasses.replace(table, notes=[f"{table.title}.", *table.notes]) for table in tables]
    numbers = equal_cost.equal_cost_table(study, found)
    return Section(
        name="clocks",
        title="Against other clocks",
        short="Other clocks",
        plans=[_plan(shown)],
        parts=[Part(table) for table in narrowed],
        files=[TableFile(equal_cost.STEM, numbers, tables, titled)] if found else [],
    )


def _plan(study: Study) -> Plan:
    name = study.main_metrics[0]
    frame = clock_curves(study, name)
    units = [UNITS[unit].words for unit in dict.fromkeys(frame["unit"])]
    caption = f"{name} against {listed(units)}. Thick lines are means, thin ones single seeds; "
    caption += "dotted where not every seed has a value that counts."
    if study.unit.name != "seconds":
        caption += "".join(f" {remark}" for remark in equal_cost.seconds_remarks(study))
    not_comparable = ("seconds",) if equal_cost.unequal_timing(study) else ()
    draw = partial(clocks_figure, not_comparable=not_comparable)
    caption += bands_remark(frame) + stops_remark(frame)
    return Plan("clocks", frame, draw, f"{name} against {listed(units)}", caption)
