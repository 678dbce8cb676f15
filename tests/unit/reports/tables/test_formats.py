"""Tables as Markdown and LaTeX: their structure, and text that stays text."""

import re

import pytest

from reports.tables.formats import latex_table, latex_text, markdown_table

ROWS = [{"cell": "sit", "fd_898": "20.0"}, {"cell": "50% & more", "fd_898": "−1.5 [−2.0, −1.0]"}]


def test_a_table_in_latex():
    assert latex_table(ROWS, ["lower is better"]).splitlines() == [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{@{}lr@{}}",
        r"\toprule",
        r"cell & fd\_898 \\",
        r"\midrule",
        r"sit & 20.0 \\",
        r"50\% \& more & \(-\)1.5 {[}\(-\)2.0, \(-\)1.0{]} \\",
        r"\bottomrule",
        r"\end{tabular}",
        "",
        "lower is better",
    ]


def test_a_table_in_markdown():
    assert markdown_table(ROWS).splitlines() == [
        "| cell | fd_898 |",
        "| --- | --- |",
        "| sit | 20.0 |",
        r"| 50% &#38; more | −1.5 \[−2.0, −1.0] |",
    ]


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        ("größer, Fréchet, Łódź", "größer, Fréchet, Łódź"),
        ("אב 日", "{[}U+05D0 U+05D1{]} {[}U+65E5{]}"),
        ("Ąþ", "{[}U+0104 U+00FE{]}"),
        ("*5 ≤ 3°", r"{*}5 \(\leq\) 3\(^\circ\)"),
        ("e\u0301", "e{[}U+0301{]}"),
    ],
)
def test_what_pdflatex_has_no_letters_for_stands_as_code_points(text, latex):
    assert latex_text(text) == latex


@pytest.mark.parametrize(
    "text", [r"\input{/etc/passwd}", "a%b", "x & y \\\\ z", "$x_1^2$ ~ #1 {", "\\end{tabular}", "two\nlines", '<|>"']
)
def test_no_text_is_a_command_in_latex(text):
    allowed = r"\\textbackslash\{\}|\\text(ascii\w+|less|greater|bar)\{\}|\\[{}$&#_%]"
    rest = re.sub(allowed, "", latex_text(text))
    assert not set(rest) & set("\\{}$&#_%~^\n")
