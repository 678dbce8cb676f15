"""Files of generated images: their layout, and what an interrupted writer leaves behind."""

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.errors import StorageError, UserError
from harness.evaluation import samples_file
from harness.evaluation.samples_file import Destination, read_images

NUM, SIDE, CHUNK = 10, 4, 4
IMAGES = np.random.default_rng(0).integers(0, 256, (NUM, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(NUM) % 3


def destination(out: Path, is_npz: bool = True, **recipe: Any) -> Destination:
    return Destination(out=out, is_npz=is_npz, num=NUM, side=SIDE, chunk=CHUNK, recipe=recipe)


def write(to: Destination, upto: int = NUM) -> int:
    """Write images from where an earlier writer stopped up to `upto`, and finish if these are all; says where."""
    with to.writer() as writer:
        for start in range(writer.done, upto, CHUNK):
            writer.add(IMAGES[start : min(start + CHUNK, upto)])
        if upto == NUM:
            writer.finish(LABELS)
        return writer.done


def read_as_adm_does(path: Path) -> np.ndarray:
    """guided-diffusion's evaluator streams the member: magic, a header of version 1, then rows in C order."""
    with zipfile.ZipFile(path) as file, file.open("arr_0.npy") as member:
        assert np.lib.format.read_magic(member) == (1, 0)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        assert not fortran
        return np.frombuffer(member.read(), dtype).reshape(shape)


def test_npz_is_in_the_layout_of_adm(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "x.npz"
    write(destination(out))
    assert np.array_equal(read_as_adm_does(out), IMAGES)
    loaded = np.load(out, allow_pickle=False)
    assert loaded.files == ["arr_0", "arr_1"]
    assert np.array_equal(loaded["arr_1"], LABELS) and loaded["arr_1"].dtype == np.int64
    assert [path.name for path in out.parent.iterdir()] == ["x.npz"]


def test_folder_holds_numbered_png_files(tmp_path: Path) -> None:
    write(destination(tmp_path / "images", is_npz=False))
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(NUM)]
    assert all(np.array_equal(np.asarray(Image.open(file)), image) for file, image in zip(files, IMAGES, strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def content(out: Path) -> list[bytes]:
    return [path.read_bytes() for path in (sorted(out.iterdir()) if out.is_dir() else [out])]


@pytest.mark.parametrize("is_npz", [True, False])
@pytest.mark.parametrize(("upto", "kept"), [(0, 0), (4, 4), (7, 4), (8, 8)])
def test_an_interrupted_writer_goes_on_at_the_start_of_a_chunk(
    tmp_path: Path, is_npz: bool, upto: int, kept: int
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    write(destination(whole, is_npz))
    write(destination(out, is_npz), upto)
    assert not out.exists(), "nothing half-written has the name"
    assert write(destination(out, is_npz)) == kept
    assert content(out) == content(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_half_an_image_is_written_again(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    write(destination(whole))
    write(destination(out), 8)
    (part,) = tmp_path.glob(".out.npz.*.part")
    with part.open("ab") as file:
        file.write(b"xy")
    assert write(destination(out)) == 8
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("is_npz", [True, False])
def test_another_recipe_does_not_go_on_with_it(tmp_path: Path, is_npz: bool) -> None:
    out = tmp_path / "out"
    write(destination(out, is_npz, seed=0), 8)
    assert write(destination(out, is_npz, seed=1)) == 0


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already: name another place"), destination(out).writer():
        pass
    assert out.read_text() == "mine"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: cannot write to .*name a place"):
        write(destination(tmp_path / "file" / "x.npz"))


def test_too_little_room_is_said_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 images of 48 bytes lie there twice while the .npz is made."""
    usage = itertools.count(2 * NUM * SIDE * SIDE * 3 - 1)
    monkeypatch.setattr(samples_file.shutil, "disk_usage", lambda path: type("Usage", (), {"free": next(usage)}))
    out = tmp_path / "x.npz"
    with pytest.raises(UserError, match=r"needs 0.0 GB while it is made .*lower --num"):
        write(destination(out))
    assert list(tmp_path.iterdir()) == []
    write(destination(out))  # one byte more
    assert out.exists()


def test_a_full_disk_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "x.npz"
    write(destination(out), 4)
    with monkeypatch.context() as patched:
        patched.setattr(samples_file.os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"), destination(out).writer() as writer:
            writer.add(IMAGES[4:8])
    assert write(destination(out)) >= 4
    assert np.array_equal(np.load(out)["arr_0"], IMAGES)


# -- reading --------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    packed, loose = tmp_path / "x.npz", tmp_path / "x"
    write(destination(packed))
    write(destination(loose, is_npz=False))
    for path in (packed, loose):
        images = read_images(path, "--samples")
        assert images.num == NUM
        assert all(np.array_equal(images.get(i), image) for i, image in enumerate(IMAGES))
        assert (images.labels_N is None) == (path is loose)
    assert read_images(packed, "--samples").labels_N.tolist() == LABELS.tolist()


def test_a_stored_array_is_mapped_and_a_packed_one_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "stored.npz", IMAGES, LABELS)
    np.savez_compressed(tmp_path / "packed.npz", IMAGES)
    stored, packed = (samples_file.read_array(tmp_path / f"{n}.npz", "arr_0", "x") for n in ("stored", "packed"))
    assert isinstance(stored, np.memmap) and not isinstance(packed, np.memmap)
    assert np.array_equal(stored, IMAGES) and np.array_equal(packed, IMAGES)
    turned = np.asfortranarray(IMAGES)
    np.savez(tmp_path / "turned.npz", turned)
    assert np.array_equal(read_images(tmp_path / "turned.npz", "x").get(3), IMAGES[3])


def test_labels_that_are_none_are_passed_over(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", IMAGES, LABELS / 2)
    assert read_images(tmp_path / "x.npz", "x").labels_N is None


def test_images_of_several_sizes_are_named(tmp_path: Path) -> None:
    for name, side in (("a.png", 4), ("b.png", 4), ("c.png", 5)):
        Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(tmp_path / name)
    images = read_images(tmp_path, "--samples")
    with pytest.raises(UserError, match=r"--samples: .*c\.png is not of the size of .*a\.png"):
        images.get(2)


def test_broken_and_missing_images_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"--samples: cannot read image .*a\.png"):
        read_images(tmp_path, "--samples")
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match="holds no PNG files"):
        read_images(tmp_path, "--samples")
    with pytest.raises(UserError, match=r"x\.npz is not there"):
        read_images(tmp_path / "x.npz", "--samples")


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"is not a \.npz of plain arrays \(it holds Python objects\)"):
        read_images(tmp_path / "x.npz", "--samples")
