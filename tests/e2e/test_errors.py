"""Wrong input: one clear line on stderr, exit status 2, no traceback, and nothing half-written among the runs."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.machine import ram
from tests.e2e.conftest import STUDY, FinishedStudy, Place, contents

Ditbench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(place: Place, ditbench: Ditbench) -> Callable[..., str]:
    """`refused(*words)`: the one line that a training command answers with."""

    def run(*words: str) -> str:
        status, out, err = ditbench(*place.words(*words))
        assert status == 2
        assert "report:" not in out
        assert not place.runs.exists(), f"left behind: {sorted(contents(place.runs))}"
        return one_line(err)

    return run


def one_line(err: str) -> str:
    assert re.fullmatch(r"ditbench: [^\n]+\n", err), err
    return err.removeprefix("ditbench: ").rstrip("\n")


def save_image(path: Path, size: tuple[int, int] = (40, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def on_folder(root: Path) -> Sequence[str]:
    return "--data.name", "imagefolder", "--data.path", str(root)


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["train", "--method", "repaa"],
            "method 'repaa' is not known (did you mean repa?): there are deep_supervision,",
        ),
        (["compare", "--methods", "sit,nothing"], "method 'nothing' is not known: there are "),
        (["compare", "--optimizer.lrr", "1"], "key 'optimizer.lrr' is not known: did you mean 'optimizer.lr'?"),
        (["compare", "--seeds", "0,one"], "argument --seeds: '0,one' is not a list of whole numbers such as 0,1,2"),
        (["compare", "--seeds", "1,1"], "seeds [1, 1] name a seed twice"),
        (["train", "--seed", "-1"], "seed is -1: give 0 or more"),
        (["train", "--study", "../elsewhere"], "study is '../elsewhere': it names a folder"),
        (["train", "--config", "nowhere.yaml"], "--config nowhere.yaml: neither a file nor a preset"),
    ],
)
def test_words_that_are_wrong(refused: Callable[..., str], words: list[str], expected: str) -> None:
    assert refused(*words).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--methods", "sit,repa", "--repa.block", "5"], "repa.block is 5: the backbone has blocks 1 to 4"),
        (["--methods", "sit,sra", "--sra.teacher_block", "-1"], "sra.teacher_block is -1: the backbone has blocks 1"),
        (["--model.name", "SiT-huge/2"], "model.name is 'SiT-huge/2': give SiT-<size>/<patch> with a size of pico,"),
        (["--model.name", "SiT-pico/3"], "data.image_size is 32: its latent of 8 x 8 cannot be cut into the 3 x 3 "
         "patches of model.name SiT-pico/3"),
        (["--data.image_size", "30"], "data.image_size is 30: the autoencoder shrinks 4 times, so give a multiple"),
        (["--evaluation.num_samples", "100"], "num_samples of evaluation or final is 100: precision and recall need as "
         "many training images and there are 90; give at most 90"),
        (["--evaluation.kid_subset", "49"], "evaluation.kid_subset is 49: there are 48 samples"),
        (["--evaluation.extractor", "clip"], "evaluation.extractor is 'clip': give one of "),
        (["--runtime.device", "tpu"], "runtime.device is 'tpu': give auto, cpu, cuda or mps"),
        (["--autoencoder.path", "nowhere"], "autoencoder.path is 'nowhere': give a folder"),
        (["--data.name", "imagefolder"], "data.path is empty: name a folder"),
        (["--optimizer.batch_size", str(2**62)], "not enough memory: at least more than 1000 TB of RAM are needed and"),
        (["--methods", "sit,vae_repa", "--vae_repa.head_width", str(2**31)], "heads of vae_repa cannot be built ("),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(refused: Callable[..., str], words: list[str], expected: str) -> None:
    assert refused("compare", "--seeds", "0", *words).startswith(expected)


def test_images_that_cannot_fit_are_refused_before_they_are_made(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ram, "free_ram", lambda: 23 * 10**9)
    line = refused("train", "--data.image_size", "2048")
    assert line.startswith("not enough memory: at least 30.1 GB of RAM are needed and 23.0 GB are free; the images")
    assert line.endswith(": lower data.image_size")


def test_a_long_value_is_cut_in_the_middle(refused: Callable[..., str]) -> None:
    line = refused("train", "--study", "x" * 5000 + "\x1b[31m")
    assert re.match("study is 'x{250,} ... x*.*: it names a folder, so leave out slashes, a leading dot and ", line)
    assert len(line) < 450
    assert line.isprintable()


def test_missing_weights_are_found_before_anything_trains(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DITBENCH_WEIGHTS", raising=False)
    line = refused("compare", "--methods", "sit,repa", "--repa.encoders", "dinov2_vitb14")
    assert line.startswith("weights of dinov2_vitb14 are not on this machine: put timm's dinov2_vitb14.safetensors")


# -- images ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused("train", *on_folder(tmp_path / "nowhere"))
    assert line.startswith(f"data.path: {tmp_path}/nowhere is not a folder")


def test_a_folder_without_class_folders(refused: Callable[..., str], tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "1.png")
    line = refused("train", *on_folder(tmp_path / "images"))
    assert line == (
        f"data.path: {tmp_path}/images has no class folders: put the images of each class into a folder of its own"
    )


def test_an_empty_class_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "full" / "1.png")
    (tmp_path / "images" / "empty").mkdir()
    (tmp_path / "images" / "empty" / "notes.txt").touch()
    line = refused("train", *on_folder(tmp_path / "images"))
    assert line.startswith(f"data.path: class folder {tmp_path}/images/empty has no images (")


def test_an_unreadable_image_is_named(refused: Callable[..., str], tmp_path: Path) -> None:
    for index in range(3):
        save_image(tmp_path / "images" / "a" / f"{index}.png")
    bad = tmp_path / "images" / "a" / "1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    line = refused("train", *on_folder(tmp_path / "images"))
    assert line.startswith(f"data.path: cannot read image {bad} (")
    assert line.endswith("): replace or remove it")


def test_too_few_images(refused: Callable[..., str], tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "a" / "1.png")
    line = refused("train", *on_folder(tmp_path / "images"))
    assert line.startswith("data.holdout is 0.95: of 1 images it leaves")


# -- places ---------------------------------------------------------------------------------------------------------


def test_an_unwritable_folder_of_runs(place: Place, ditbench: Ditbench) -> None:
    """Refused before the data is read: a path below a regular file cannot be made, not even by root."""
    (place.folder / "file").touch()
    place = Place(place.folder, place.folder / "cache")
    status, _, err = ditbench(*place.words("train"), "--output.runs", str(place.folder / "file" / "runs"))
    assert status == 2
    assert one_line(err) == (
        f"output.runs is '{place.folder}/file/runs': {place.folder}/file cannot be written to; "
        "name a folder you may write to"
    )
    assert contents(place.folder) == {"file": b""}


def test_an_unwritable_cache(place: Place, ditbench: Ditbench) -> None:
    (place.folder / "file").touch()
    status, _, err = ditbench(*place.words("train"), "--output.cache", str(place.folder / "file" / "cache"))
    assert status == 2
    assert one_line(err).startswith(f"output.cache: cannot write to {place.folder}/file/cache")
    assert not place.runs.exists()


def test_an_unwritable_place_for_samples(finished: FinishedStudy, ditbench: Ditbench, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("images", "images.npz"):
        out = tmp_path / "file" / name
        status, _, err = ditbench("sample", str(finished.run("sit")), "--num", "2", "--out", str(out))
        assert status == 2
        assert one_line(err).startswith(f"--out: cannot write to {out} (")
    assert contents(tmp_path) == {"file": b""}


def test_a_study_of_the_same_name_with_other_settings(finished: FinishedStudy, ditbench: Ditbench) -> None:
    """Found before a missing cell of that study trains."""
    before = contents(finished.path)
    words = finished.place.words("compare", *STUDY, "--methods", "sra,sit", "--optimizer.lr", "0.25")
    status, _, err = ditbench(*words)
    assert status == 2
    assert one_line(err).startswith(f"{finished.run('sit')} holds a run with another optimizer.lr (")
    assert one_line(err).endswith(", now 0.25): give another --study, or remove that folder")
    assert contents(finished.path) == before


def test_a_study_of_the_same_name_on_other_data(place: Place, ditbench: Ditbench) -> None:
    """The folder's path is as before, one image in it is not."""
    for name in ("a", "b"):
        for index in range(6):
            save_image(place.folder / "images" / name / f"{index}{name}.png", (40, 41 + index))
    words = place.words(
        *("train", *on_folder(place.folder / "images"), "--data.holdout", "0.5", "--evaluation.num_samples", "6"),
        *("--evaluation.kid_subset", "4", "--budget.amount", "1", "--output.mlflow", "false", "--study", "s"),
    )
    assert ditbench(*words)[0] == 0
    before = contents(place.runs)
    save_image(place.folder / "images" / "b" / "0b.png", (60, 70))
    status, _, err = ditbench(*words)
    assert status == 2
    assert one_line(err).startswith(f"{place.runs}/s/sit/seed0 holds a run with another digest of ")
    assert contents(place.runs) == before


def test_a_step_without_weights(finished: FinishedStudy, ditbench: Ditbench) -> None:
    status, _, err = ditbench("evaluate", str(finished.run("sit")), "--step", "4")
    assert status == 2
    assert "there is no EMA backbone of step 4 in" in one_line(err)
    assert one_line(err).endswith(": give one of 3, 6")


def test_a_folder_that_is_no_run(place: Place, ditbench: Ditbench) -> None:
    for command in ("evaluate", "sample"):
        status, _, err = ditbench(command, str(place.folder))
        assert status == 2
        assert one_line(err) == f"{place.folder}/manifest.json is missing: is this a run folder of ditbench?"
    status, _, err = ditbench("report", str(place.folder))
    assert status == 2
    assert one_line(err).startswith(f"{place.folder} holds no runs")


# -- the process ----------------------------------------------------------------------------------------------------


def test_the_process_says_it_the_same_way(place: Place) -> None:
    result = place.process("nothing")
    assert (result.returncode, result.stdout) == (2, "")
    assert one_line(result.stderr).startswith("command 'nothing' is not known: there are train, compare, ")
    result = place.process("report", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert one_line(result.stderr).startswith("nowhere holds no runs")
    result = place.process("report", "nowhere", "--debug")
    assert result.returncode == 2
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert result.stderr.splitlines()[-1].startswith("ditbench: nowhere holds no runs")
    assert list(place.folder.iterdir()) == []


def test_libraries_add_no_line_to_it(place: Place) -> None:
    """With every library loaded, in a process of its own."""
    (place.folder / "images").mkdir()
    result = place.process(*place.words("train", *on_folder(place.folder / "images")))
    assert result.returncode == 2
    assert one_line(result.stderr).startswith(f"data.path: {place.folder}/images has no class folders")
    assert not place.runs.exists()
