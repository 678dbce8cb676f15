"""Images: values by hand, every mode, every error, the split and the digest."""

import os
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

from harness.config import DataConfig
from harness.data import file_digests, folders
from harness.data import images as data
from harness.data.image_set import split
from harness.data.images import load_images
from harness.data.pictures import centre_crop, read_image, to_rgb
from harness.errors import UserError


def digits(size: int = 32) -> DataConfig:
    return DataConfig(name="digits", image_size=size)


def write(path: Path, colour: tuple[int, ...] = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes, one image at depth two, other files beside them."""
    root = tmp_path / "images"
    write(root / "cat" / "b.png", (1, 1, 1))
    write(root / "cat" / "a.PNG", (2, 2, 2))
    write(root / "ant" / "deep" / "c.bmp", (3, 3, 3))
    write(root / "ant" / "d.webp", (255, 255, 255))
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / "ant" / "._d.webp").write_bytes(b"what some systems leave beside a file")
    write(root / ".hidden" / "e.png")
    return root


def folder_config(root: Path, size: int = 8) -> DataConfig:
    return DataConfig(path=str(root), image_size=size)


def test_every_kind_of_data_set_that_can_be_named_has_a_source() -> None:
    assert data.SOURCES.keys() == set(get_args(get_type_hints(DataConfig)["name"]))


# -- digits ---------------------------------------------------------------------------------------------------------


def test_digits_at_their_own_size_are_the_source_scaled(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    images = load_images(digits(8), tmp_path)
    source = load_digits()
    assert images.rows(np.arange(1797)).shape == (1797, 8, 8, 3)
    assert images.labels.tolist() == source.target.tolist() and images.labels.dtype == np.int64
    assert images.class_names == tuple("0123456789") and images.num_classes == 10
    # The first row of the first digit is 0 0 5 13 9 1 0 0 of 16: times 255/16 is 79.69, 207.19, 143.44, 15.94.
    assert source.images[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    for channel in range(3):
        assert images.rows(np.array([0]))[0, 0, :, channel].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]


def cubic(x: float) -> float:
    """Keys' kernel with a = -1/2, which is Pillow's bicubic."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def enlarge(image: np.ndarray, side: int) -> np.ndarray:
    """Slow bicubic enlargement: pixel centres, weights of pixels outside the image shared by those inside.

    Rows first, then columns, rounded and clipped to 0..255 after each, because Pillow keeps 8 bits in between.
    """
    num = len(image)
    weights = np.zeros((side, num))
    for i in range(side):
        centre = (i + 0.5) * num / side
        weights[i] = [cubic(centre - (j + 0.5)) for j in range(num)]
        weights[i] /= weights[i].sum()
    wide = np.clip(np.round(image @ weights.T), 0, 255)
    return np.clip(np.round(weights @ wide), 0, 255)


def test_enlarged_digits_equal_a_slow_bicubic(tmp_path: Path) -> None:
    small = load_images(digits(8), tmp_path).rows(np.array([0, 700]))[..., 0]
    large = load_images(digits(32), tmp_path).rows(np.array([0, 700]))[..., 0]
    for before, after in zip(small.astype(float), large, strict=True):
        assert np.abs(enlarge(before, 32) - after).max() <= 1  # Pillow's weights are rounded to 22 bits


def test_digits_digest_depends_on_the_size_and_on_nothing_else(tmp_path: Path) -> None:
    first = load_images(digits(8), tmp_path / "a").digest
    assert first == load_images(digits(8), tmp_path / "b").digest
    assert first != load_images(digits(16), tmp_path / "a").digest


def test_the_outline_counts_what_is_read(folder: Path, tmp_path: Path) -> None:
    for config in (digits(8), folder_config(folder)):
        found = data.outline(config)
        assert found.num_images == len(load_images(config, tmp_path / "cache"))
        assert found.is_cached == (config.name == "imagefolder") and not found.has_moments


# -- modes ----------------------------------------------------------------------------------------------------------


def only_colour(image: np.ndarray) -> list[int]:
    assert (image == image[0, 0]).all()
    return image[0, 0].tolist()


def test_grey_and_palette(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 77).save(tmp_path / "l.png")
    assert only_colour(read_image(tmp_path / "l.png", 8)) == [77, 77, 77]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").mode == "P"
    assert only_colour(read_image(tmp_path / "p.png", 8)) == [200, 100, 50]


def test_palette_with_a_transparent_entry_becomes_white_there(tmp_path: Path) -> None:
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 100, 50])
    palette.save(tmp_path / "p.png", transparency=1)
    assert only_colour(read_image(tmp_path / "p.png", 8)) == [255, 255, 255]


def test_16_bit_grey_is_scaled_not_cut_off(tmp_path: Path) -> None:
    values = np.full((8, 8), 30000, np.uint16)
    Image.fromarray(values).save(tmp_path / "i.png")
    # 30000 / 65535 * 255 = 116.73
    assert Image.open(tmp_path / "i.png").mode == "I;16"
    assert only_colour(read_image(tmp_path / "i.png", 8)) == [117, 117, 117]
    assert only_colour(np.asarray(to_rgb(Image.fromarray(values.astype(np.int32))))) == [117, 117, 117]


@pytest.mark.parametrize(
    ("mode", "pixel", "expected"),
    [
        # grey * alpha + 255 * (1 - alpha) with alpha = 51 / 255 = 0.2
        ("LA", (100, 51), [224, 224, 224]),  # 0.2 * 100 + 0.8 * 255 = 224
        ("RGBA", (100, 0, 255, 51), [224, 204, 255]),  # 0.8 * 255 = 204
        ("RGBA", (9, 9, 9, 0), [255, 255, 255]),
        ("RGBA", (9, 8, 7, 255), [9, 8, 7]),
    ],
)
def test_alpha_is_composited_on_white(tmp_path: Path, mode: str, pixel: tuple[int, ...], expected: list[int]) -> None:
    Image.new(mode, (8, 8), pixel).save(tmp_path / "a.png")
    assert only_colour(read_image(tmp_path / "a.png", 8)) == expected


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "c.tif")
    assert Image.open(tmp_path / "c.tif").mode == "CMYK"
    assert only_colour(read_image(tmp_path / "c.tif", 8)) == [0, 255, 255]  # full cyan takes all red away


def test_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    left_white = np.zeros((8, 8, 3), np.uint8)
    left_white[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: rotate by 90 degrees clockwise to show
    Image.fromarray(left_white).save(tmp_path / "e.png", exif=exif)
    shown = read_image(tmp_path / "e.png", 8)
    assert (shown[:4] == 255).all() and (shown[4:] == 0).all()  # the left half is now the upper half


def test_only_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert only_colour(read_image(tmp_path / "a.gif", 8)) == [255, 0, 0]


# -- resize and crop ------------------------------------------------------------------------------------------------


def test_halving_is_a_mean_over_2_by_2_pixels() -> None:
    values = np.arange(16 * 16, dtype=np.uint8).reshape(16, 16)
    cropped = np.asarray(centre_crop(Image.fromarray(values), 8))
    expected = values.astype(float).reshape(8, 2, 8, 2).mean((1, 3))
    assert np.abs(cropped - expected).max() <= 0.5


def test_the_centre_of_the_long_side_is_kept() -> None:
    values = np.zeros((8, 20), np.uint8)
    values[:, 6:14] = np.arange(1, 9)
    assert np.asarray(centre_crop(Image.fromarray(values), 8)).tolist() == [list(range(1, 9))] * 8


@pytest.mark.parametrize("size", [(3, 50), (50, 3), (8, 8), (9, 8), (17, 16), (333, 15), (1, 1)])
def test_any_size_becomes_a_square(size: tuple[int, int]) -> None:
    assert centre_crop(Image.new("RGB", size), 8).size == (8, 8)


# -- a folder of class folders --------------------------------------------------------------------------------------


def test_folder_order_labels_and_names(folder: Path, tmp_path: Path) -> None:
    images = load_images(folder_config(folder), tmp_path / "cache")
    assert images.class_names == ("ant", "cat") and images.num_classes == 2 and len(images) == 4
    assert images.labels.tolist() == [0, 0, 1, 1] and images.labels.dtype == np.int64
    # ant/d.webp, ant/deep/c.bmp, cat/a.PNG, cat/b.png
    shown = images.rows(np.arange(4))
    assert shown.dtype == np.uint8 and shown.shape == (4, 8, 8, 3)
    assert [only_colour(image)[0] for image in shown] == [255, 3, 2, 1]


def test_second_start_reads_no_file_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_images(folder_config(folder), tmp_path / "cache")

    def never(*args: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(file_digests, "file_digest", never)
    monkeypatch.setattr(folders, "read_image", never)
    second = load_images(folder_config(folder), tmp_path / "cache")
    assert second.digest == first.digest
    assert (second.rows(np.arange(4)) == first.rows(np.arange(4))).all()


def test_digest_does_not_depend_on_the_place(folder: Path, tmp_path: Path) -> None:
    first = load_images(folder_config(folder), tmp_path / "cache").digest
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert load_images(folder_config(moved), tmp_path / "cache").digest == first
    assert load_images(folder_config(moved, size=16), tmp_path / "cache").digest != first


def test_digest_changes_with_content_name_and_files(folder: Path, tmp_path: Path) -> None:
    seen = [load_images(folder_config(folder), tmp_path / "cache").digest]
    write(folder / "cat" / "b.png", (1, 1, 9))
    changed = load_images(folder_config(folder), tmp_path / "cache")
    assert only_colour(changed.rows(np.array([3]))[0]) == [1, 1, 9]
    seen.append(changed.digest)
    (folder / "cat" / "b.png").rename(folder / "cat" / "z.png")
    seen.append(load_images(folder_config(folder), tmp_path / "cache").digest)
    write(folder / "cat" / "zz.png", (4, 4, 4))
    seen.append(load_images(folder_config(folder), tmp_path / "cache").digest)
    assert len(set(seen)) == 4


def test_a_touched_file_with_the_same_content_keeps_the_digest(folder: Path, tmp_path: Path) -> None:
    first = load_images(folder_config(folder), tmp_path / "cache").digest
    os.utime(folder / "cat" / "b.png", ns=(1, 1))
    assert load_images(folder_config(folder), tmp_path / "cache").digest == first


def test_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not a folder"):
        load_images(folder_config(tmp_path / "nowhere"), tmp_path)


def test_a_folder_without_class_folders(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"images has no class folders: put the images of each class"):
        load_images(folder_config(tmp_path / "images"), tmp_path / "cache")


def test_an_empty_class_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "bee").mkdir()
    (folder / "bee" / "readme.txt").write_text("")
    with pytest.raises(UserError, match=r"class folder .*bee has no images"):
        load_images(folder_config(folder), tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_an_unreadable_image_is_named(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    bad = folder / "cat" / "bad.png"
    whole = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(whole).save(bad)
    bad.write_bytes(bad.read_bytes()[:3000] if content is None else content)  # None: cut short
    with pytest.raises(UserError, match=r"cannot read image .*cat.bad\.png .*: replace or remove it"):
        load_images(folder_config(folder), tmp_path / "cache")
    bad.unlink()
    assert len(load_images(folder_config(folder), tmp_path / "cache")) == 4


def test_a_dangling_link_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(UserError, match=r"cannot read .*link\.png"):
        load_images(folder_config(folder), tmp_path / "cache")


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"f\.tif .*floating-point"):
        read_image(tmp_path / "f.tif", 8)


# -- split ----------------------------------------------------------------------------------------------------------


def test_split_of_the_digits() -> None:
    train, held_out = split(1797, 0.5, 0)
    assert len(train) == 899 and len(held_out) == 898
    assert train.dtype == held_out.dtype == np.int64
    assert sorted([*train, *held_out]) == list(range(1797))
    assert (np.diff(train) > 0).all() and (np.diff(held_out) > 0).all()
    again, other = split(1797, 0.5, 0)[0], split(1797, 0.5, 1)[0]
    assert (again == train).all() and not np.array_equal(other, train)
    # A random half, not the first or every second one: half of 899 expected in either part, deviation about 11.
    assert abs((train < 898).sum() - 449.5) < 60 and abs((train % 2 == 0).sum() - 449.5) < 60


def test_split_rounds_down_the_held_out_part() -> None:
    assert [len(part) for part in split(100, 0.29, 0)] == [71, 29]  # 100 * 0.29 is 28.999999999999996
    assert [len(part) for part in split(5, 0.5, 0)] == [3, 2]


@pytest.mark.parametrize(("num", "holdout"), [(1, 0.5), (3, 0.1)])
def test_a_split_with_an_empty_part_is_refused(num: int, holdout: float) -> None:
    with pytest.raises(UserError, match=rf"data\.holdout is {holdout}: of {num} images"):
        split(num, holdout, 0)
