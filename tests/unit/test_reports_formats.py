"""Tables as Markdown and LaTeX: their structure, and text that stays text."""

import re

import pytest

from reports.formats import latex_table, latex_text, markdown_table

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
    "text", [r"\input{/etc/passwd}", "a%b", "x & y \\\\ z", "$x_1^2$ ~ #1 {", "\\end{tabular}", "two\nlines", '<|>"']
)
def test_no_text_is_a_command_in_latex(text):
    allowed = r"\\textbackslash\{\}|\\text(ascii\w+|less|greater|bar)\{\}|\\[{}$&#_%]"
    rest = re.sub(allowed, "", latex_text(text))
    assert not set(rest) & set("\\{}$&#_%~^\n")
