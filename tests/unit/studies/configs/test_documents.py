"""What a user's YAML is refused for before the parser sees it, with line and key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from harness.errors import UserError
from studies.configs.documents import check_file, check_word


@pytest.fixture
def checked(tmp_path: Path) -> Callable[[bytes | str], str]:
    """`checked(content)`: what a file with this content is refused with, the file's name cut off; "" if it is not."""

    def check(content: bytes | str) -> str:
        path = tmp_path / "file.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        try:
            check_file(path)
        except UserError as error:
            assert str(error).startswith(f"--config {path} ")
            return str(error).removeprefix(f"--config {path} ")
        return ""

    return check


@pytest.mark.parametrize(
    "content",
    [
        "seed: 1",
        "---\nseed: 1\n",
        "cells: {1: {method: sit}, on: {method: repa}}",
        "\ufeffseed: 1",
        '{"seed": 1, "optimizer": {"lr": 0.1}}',
        "optimizer: &o {lr: 1.0}\nema: {decay: 0.5}\nmine: *o",
        "base: &b {a: 1, c: 2}\nmine: {<<: *b, a: 3}",
    ],
)
def test_good_files_pass(checked: Callable[[bytes | str], str], content: str) -> None:
    assert checked(content) == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: 1\nseed: 2", "cannot be used, line 2: seed is given twice"),
        ("seed: 1\noptimizer:\n  lr: 1\n  lr: 2", "cannot be used, line 4: optimizer.lr is given twice"),
        ("cell: [{a: 1, a: 2}]", "cannot be used, line 1: cell.a is given twice"),
        ("seed: 1\ncell: 'a", "cannot be read as YAML, line 2: found unexpected end of stream"),
        ("cell: *a", "cannot be read as YAML, line 1: found undefined alias 'a'"),
        ("\tseed: 1", "cannot be read as YAML, line 1: found character '\\t' that cannot start any token"),
        (
            "cell: !!python/object/apply:os.getcwd []",
            "cannot be used, line 1: could not determine a constructor for the ",
        ),
        (f"ema: {{decay: 1{'0' * 400}}}", "cannot be used, line 1: ema.decay has 401 digits"),
        ("1: 2", "cannot be used, line 1: 1 ends in no text: put it in quotes"),
        ("ema:\n  on: 2", "cannot be used, line 2: ema.on ends in no text"),
        ("[1, 2]: 3", "cannot be used, line 1: found unhashable key"),
        ("day: 2026-13-45", "cannot be used: month must be in 1..12"),
        ("", "is no mapping of keys to values: write one, such as seed: 1"),
        ("- seed", "is no mapping of keys to values"),
        ("seed: 1\n---\nseed: 2", "is no mapping of keys to values"),
    ],
)
def test_bad_files_are_named_with_the_place(checked: Callable[[bytes | str], str], content: str, message: str) -> None:
    assert checked(content).startswith(message)


def test_bytes_that_are_no_text(checked: Callable[[bytes | str], str]) -> None:
    assert checked(b"seed: \xff").startswith("cannot be read as YAML: 'utf-8' codec can't decode byte")
    assert checked("seed: \x00").startswith("cannot be read as YAML: unacceptable character #x0000")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--config .*nowhere cannot be read \(No such file or directory\)"):
        check_file(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "word", ["", "a", "1e-3", "-", "'a", "[1, 2]", "{a: {b: 1}}", "*x", "a: b: c", "\x00", "\udcff"]
)
def test_words_pass(word: str) -> None:
    check_word(word, "cell")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("1" + "0" * 400, "ema.decay cannot be used, line 1: ema.decay has 401 digits"),
        ("{a: 1, a: 2}", "ema.decay cannot be used, line 1: ema.decay.a is given twice"),
    ],
)
def test_words_that_are_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        check_word(word, "ema.decay")
    assert str(caught.value).startswith(message)
