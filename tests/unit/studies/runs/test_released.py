"""How a checkpoint on the command line is told to be ours or released; e2e/test_released.py opens some."""

from pathlib import Path

import pytest

from harness.errors import UserError
from studies.runs import released


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an EMA backbone and a whole checkpoint."""
    folder = tmp_path / "runs" / "study" / "sit" / "seed0"
    (folder / "checkpoints" / "step_00000400").mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    (folder / "checkpoints" / "ema_00000420.safetensors").write_bytes(b"")
    return folder


@pytest.mark.parametrize("words", [[], ["runs/a/sit/seed0"], ["run", "--step", "3", "--evaluation.seed=4"]])
def test_without_a_checkpoint_the_words_stay_as_they_are(words: list[str]) -> None:
    assert released.route(words) == (False, words)


def test_a_source_makes_a_file_a_released_one(run: Path) -> None:
    for words in (
        ["--checkpoint", str(run), "--source", "repa"],
        ["--source=repa"],
        ["--config", "c", "--source", "x"],
    ):
        assert released.route(words) == (True, words)


def test_a_checkpoint_of_ours_becomes_its_run_and_step(run: Path) -> None:
    more = ["--evaluation.seed", "4"]
    assert released.route(["--checkpoint", str(run), *more]) == (False, [str(run), *more])
    ema, whole = run / "checkpoints" / "ema_00000420.safetensors", run / "checkpoints" / "step_00000400"
    assert released.route([*more, f"--checkpoint={ema}"]) == (False, [str(run), "--step", "420", *more])
    assert released.route(["--checkpoint", str(whole)]) == (False, [str(run), "--step", "400"])


def test_any_other_checkpoint_needs_a_source(run: Path, tmp_path: Path) -> None:
    (tmp_path / "ema_00000420.safetensors").write_bytes(b"")
    strange = [
        str(tmp_path),
        str(tmp_path / "ema_00000420.safetensors"),
        str(run / "checkpoints"),
        str(run / "checkpoints" / "ema_00000421.safetensors"),
        "",
    ]
    for value in strange:
        with pytest.raises(UserError, match=r"neither a run of ours .* give --source \(repa, sra, sit\) and --config"):
            released.route(["--checkpoint", value])
    with pytest.raises(UserError, match="neither a run of ours"):
        released.route(["--checkpoint"])
