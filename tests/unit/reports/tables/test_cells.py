"""Cells of tables: the number behind a text decides its column's type and its place when sorted."""

import math

from reports.tables.cells import Cell, TableColumn, columns, sort_key


def test_a_column_is_of_numbers_where_a_cell_stands_for_one():
    rows = [{"block": Cell("1", 1), "cost": "failed", "loss": "1"}, {"block": "2", "cost": Cell("> 8", 8), "loss": "2"}]
    assert columns(rows) == [TableColumn("block", False), TableColumn("cost", True), TableColumn("loss", False)]


def test_keys_are_what_the_script_reads():
    cells = (Cell("−1,200.5", -1200.5), Cell("> budget", math.inf), Cell("–", math.nan), "12", Cell("", 2e-7))
    assert [sort_key(cell) for cell in cells] == ["-1200.5", "Infinity", "", "", "2e-07"]
