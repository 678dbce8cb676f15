"""Columns of text: what a cell is sorted by, and which columns are numbers."""

import math

import pytest

from reports.page.columns import columns, sort_key, sort_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("19.25", 19.25),
        ("−3.1 [−5.0, −1.2]", -3.1),
        ("-0.5", -0.5),
        ("+12.3%", 12.3),
        ("1,234,567", 1234567),
        ("12,345.5", 12345.5),
        ("19.2, 20.1", 19.2),
        ("100,200", 100200),
        ("1,2", 1),
        ("1.5e-05", 1.5e-5),
        ("(23.16)", 23.16),
        ("0.62x [0.55, 0.71]", 0.62),
        ("20.0 †", 20.0),
        ("2 of 3 seeds", 2),
        ("≤ 100", 100),
        ("diverged, 20.1", 20.1),
        ("> budget", math.inf),
        ("> 420", math.inf),
        ("∞", math.inf),
        ("–", None),
        ("", None),
        ("failed", None),
    ],
)
def test_the_number_of_a_cell(text, number):
    assert sort_number(text) == number


def test_keys_are_what_the_script_reads():
    assert [sort_key(text) for text in ("−1,200.5", "> budget", "–", "2e-7")] == ["-1200.5", "Infinity", "", "2e-07"]


@pytest.mark.parametrize(
    ("cells", "is_number"),
    [
        (["19.2", "–", "20.1 †"], True),
        (["19.2, 20.1", "diverged, 18.0"], True),
        (["−3.1 [−5.0, −1.2]", ""], True),
        (["0.62x [0.55, 0.71]", "> budget", "no pair"], True),
        (["12%", "+3.5%"], True),
        (["800 MB", "1.3 GB"], False),
        (["2 finished", "1 finished, 1 diverged"], False),
        (["better, 2 of 2 seeds", "–"], False),
        (["smooth_l1", "1"], False),
        (["block 1", "block 2"], False),
        (["a_1"], False),
        (["2026-01-01T00:00:00"], False),
        (["–", ""], False),
        (["failed", "diverged"], False),
    ],
)
def test_a_column_of_numbers_is_known_by_what_it_holds(cells, is_number):
    _, column = columns([{"cell": "x", "it": cell} for cell in cells])
    assert column.is_number is is_number


def test_the_first_column_names_rows():
    assert [column.is_number for column in columns([{"block": "1", "mean": "2.0"}, {"block": "2", "mean": "3.0"}])] == [
        False,
        True,
    ]
