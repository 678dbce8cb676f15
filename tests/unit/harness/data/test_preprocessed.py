"""The layout of the EDM2 and REPA tools, written here as those tools write it, and read in place."""

import io
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from harness.config import DataConfig, ModelConfig, OutputConfig, RunConfig
from harness.data import file_digests, preprocessed
from harness.data import images as data
from harness.data.image_set import ImageSet
from harness.data.images import load_images
from harness.data.prepare import estimate, prepare
from harness.errors import UserError
from harness.frozen.autoencoder import Autoencoder
from harness.method import Needs

NUM, SIDE = 7, 16
CLASSES = [2, 0, 0, 4, 1, 2, 0]
"""Class 3 has no image."""


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM, SIDE, SIDE, 3), dtype=np.uint8)


def moments() -> np.ndarray:
    """What the tools' encoder gives: cat(mean, std), one image at a time (preprocessing/encoders.py:77-84)."""
    autoencoder = Autoencoder.load("digits", "cpu")
    return np.concatenate([autoencoder.moments(picture[None]).numpy() for picture in pictures()])


def image_files() -> dict[str, bytes]:
    """dataset_tools.py convert: uncompressed PNG, and labels by name."""
    files, labels = {}, []
    for i, picture in enumerate(pictures()):
        name, content = f"{i:08d}"[:5] + f"/img{i:08d}.png", io.BytesIO()
        Image.fromarray(picture).save(content, format="png", compress_level=0, optimize=False)
        files[name] = content.getvalue()
        labels.append([name, CLASSES[i]])
    return {**files, "dataset.json": json.dumps({"labels": labels}).encode()}


def moment_files() -> dict[str, bytes]:
    """dataset_tools.py encode: one .npy an image, and labels by name."""
    files, labels = {}, []
    for i, values in enumerate(moments()):
        name, content = f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy", io.BytesIO()
        np.save(content, values)
        files[name] = content.getvalue()
        labels.append([name, CLASSES[i]])
    return {**files, "dataset.json": json.dumps({"labels": labels}).encode()}


def write(place: Path, files: dict[str, bytes]) -> Path:
    """As a folder, or as an uncompressed zip where the name says so (dataset_tools.py open_dest)."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.suffix == ".zip":
        with zipfile.ZipFile(place, "w", compression=zipfile.ZIP_STORED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return place
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


@pytest.fixture(params=["", ".zip"], ids=["folder", "zip"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """REPA's data folder."""
    write(tmp_path / "data" / f"images{request.param}", image_files())
    write(tmp_path / "data" / f"vae-sd{request.param}", moment_files())
    return tmp_path / "data"


def part(root: Path, name: str) -> Path:
    return next(root.glob(f"{name}*"))


def settings(root: Path, **fields: Any) -> DataConfig:
    return DataConfig(**{"name": "preprocessed", "path": str(root), "image_size": SIDE, "holdout": 0.3, **fields})


def load(root: Path, **fields: Any) -> ImageSet:
    return load_images(settings(root, **fields), root.parent / "cache")


def config(root: Path, **fields: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name="SiT-pico/2"),
        data=settings(root, **fields),
        output=OutputConfig(cache=str(root.parent / "cache")),
    )


def test_images_labels_and_moments_are_those_of_the_files(root: Path) -> None:
    images = load(root)
    order = np.array([6, 0, 3, 3])
    assert (images.rows(order) == pictures()[order]).all() and images.rows(order).dtype == np.uint8
    assert images.labels.tolist() == CLASSES and images.labels.dtype == np.int64
    assert images.num_classes == 5 and images.class_names == ("0", "1", "2", "3", "4")
    assert images.moments is not None and images.moments.shape == (NUM, 8, 4, 4)
    assert (images.moments.rows(order) == moments()[order]).all()
    assert images.moments.rows(np.array([], dtype=np.int64)).shape == (0, 8, 4, 4)


def test_nothing_is_encoded_or_copied(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    real = Autoencoder.moments

    def counted(self: Autoencoder, images: np.ndarray) -> Any:
        encoded.append(len(images))
        return real(self, images)

    monkeypatch.setattr(Autoencoder, "moments", counted)
    prepared = prepare(config(root), Needs(), "cpu")
    assert encoded == [3], "a few images show that the moments are theirs"
    assert (prepared.moments.rows(np.arange(NUM)) == moments()).all()
    assert [path.name.split("-")[0] for path in (root.parent / "cache").iterdir()] == ["files", "files"]


def test_tokens_are_those_of_the_images_in_place(root: Path) -> None:
    name = "efficientnet_lite0"
    tokens = prepare(config(root), Needs(encoders=(name,)), "cpu").tokens[name]
    assert tokens.shape == (NUM, 4, 1280)
    folders = root.parent / "folders"
    for i, picture in enumerate(pictures()):
        (folders / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folders / "a" / f"{i}.png")
    plain = replace(config(root), data=DataConfig(path=str(folders), image_size=SIDE, holdout=0.3))
    assert (
        prepare(plain, Needs(encoders=(name,)), "cpu").tokens[name].rows(np.arange(NUM)) == tokens.rows(np.arange(NUM))
    ).all()


def test_the_outline_counts_without_an_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessed, "decode_image", None)
    for path, has_moments in ((root, True), (part(root, "images"), False)):
        found = data.outline(DataConfig(name="preprocessed", path=str(path), image_size=SIDE))
        assert (found.num_images, found.num_classes) == (NUM, 5), "class 3 counts, though it has no image"
        assert (found.is_cached, found.has_moments) == (False, has_moments)


def test_only_what_is_made_is_estimated(root: Path) -> None:
    tokens = {"tokens-efficientnet_lite0": NUM * 4 * 1280 * 2}
    needs = Needs(encoders=("efficientnet_lite0",))
    assert estimate(config(root), needs) == tokens
    mirrored = {f"{kind}-mirrored": size for kind, size in tokens.items()}
    flipping = estimate(config(root, flip=True), needs)
    assert flipping == {**tokens, "moments-mirrored": NUM * 8 * 4 * 4 * 4, **mirrored}
    assert estimate(config(part(root, "images")), Needs()) == {"moments": NUM * 8 * 4 * 4 * 4}


def test_images_without_moments_are_encoded(root: Path) -> None:
    part(root, "vae-sd").rename(root.parent / part(root, "vae-sd").name)
    for path in (root, part(root, "images")):
        prepared = prepare(config(path), Needs(), "cpu")
        np.testing.assert_allclose(prepared.moments.rows(np.arange(NUM)), moments(), atol=1e-4, rtol=1e-4)
    moved = str(next(root.parent.glob("vae-sd*")))
    assert load(part(root, "images"), latents=moved).moments is not None


def test_the_digest_follows_the_content_and_not_the_place(root: Path) -> None:
    seen = [load(root).digest]
    moved = root.parent / "moved" / "data"
    moved.parent.mkdir()
    root.rename(moved)
    assert load(moved).digest == seen[0]
    images, latents = part(moved, "images"), part(moved, "vae-sd")
    renamed = images.rename(moved / f"pixels{images.suffix}")
    assert load(renamed, latents=str(latents)).digest == seen[0]
    seen.append(load(renamed).digest)  # without the moments
    files = {**image_files()}
    files["dataset.json"] = files["dataset.json"].replace(b", 4]", b", 3]")
    seen.append(load(write(moved / f"other{images.suffix}", files)).digest)
    assert len(set(seen)) == 3


def test_a_second_start_reads_no_content_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(root)

    def never(*args: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(file_digests, "file_digest", never)
    assert load(root).digest == first.digest


def test_whole_verification_names_what_changed_behind_the_size_and_time(root: Path) -> None:
    opened = load(root)
    assert opened.moments is not None
    told: list[int] = []
    for rows in (opened.images, opened.moments):
        assert not isinstance(rows, np.ndarray)
        rows.verify(lambda what, done, total: told.append(total - done))
    assert told[-1] == 0
    held = part(root, "vae-sd")
    file = held if held.is_file() else held / "00000" / "img-mean-std-00000004.npy"
    state = file.stat()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UserError, match=rf"{file.name} is not what it was when it was first read"):
        opened.moments.verify()


def test_a_zip_is_read_by_forked_processes_at_their_own_place(tmp_path: Path) -> None:
    write(tmp_path / "images.zip", image_files())
    images = load(tmp_path / "images.zip")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    order = np.arange(40) % NUM

    def read() -> None:
        queue.put(np.concatenate([images.rows(order[i : i + 1]) for i in range(len(order))]))

    readers = [context.Process(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for rows in (queue.get(), queue.get()):
        assert (rows == pictures()[order]).all()
    for reader in readers:
        reader.join()


# -- what does not fit ----------------------------------------------------------------------------------------------


def relabelled(change: Callable[[list[Any]], Any]) -> dict[str, bytes]:
    files = image_files()
    return {
        **files,
        "dataset.json": json.dumps({"labels": change(json.loads(files["dataset.json"])["labels"])}).encode(),
    }


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.txt": b""}, r"holds no files of .*\.png"),
        ({k: v for k, v in image_files().items() if k != "dataset.json"}, r"has no labels in dataset\.json"),
        (relabelled(lambda labels: None), r"has no labels in dataset\.json"),
        (relabelled(lambda labels: labels[:-1]), r"has no label of 00000/img00000006\.png"),
        (relabelled(lambda labels: [[n, -1] for n, _ in labels]), r"is not of the form .*classes from 0"),
        (relabelled(lambda labels: [[n, 2**20] for n, _ in labels]), r"is not of the form"),
        (relabelled(lambda labels: [[n, [0.0, 1.0]] for n, _ in labels]), r"is not of the form"),
        (relabelled(lambda labels: [1]), r"is not of the form"),
        ({**image_files(), "dataset.json": b"no json"}, r"is not of the form"),
        ({**image_files(), "dataset.json": b"[" * 100_000}, r"is not of the form"),
    ],
)
def test_images_that_do_not_fit(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name in ("images", "images.zip"):
        with pytest.raises(UserError, match=message):
            load(write(tmp_path / name, files))


def changed(name: str, content: bytes | None) -> dict[str, bytes]:
    files = moment_files()
    files.pop(name)
    return files if content is None else {**files, name: content}


def npy(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, values, allow_pickle=True)
    return content.getvalue()


LAST = "00000/img-mean-std-00000006.npy"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (changed(LAST, None), r"has 7 images and .* moments of 6; 00000/img00000006 is in one of them only"),
        (
            changed("dataset.json", moment_files()["dataset.json"].replace(b", 4]", b", 1]")),
            "labels of .*03.png differ",
        ),
        (changed(LAST, npy(moments()[:2])), r"06\.npy .*not the mean and std of one image"),
        (changed(LAST, npy(moments()[0, :, :2])), r"06\.npy .*its shape is \(8, 2, 4\), that of the first file"),
        (changed(LAST, npy(np.concatenate([moments()[0, :4], np.log(moments()[0, 4:] ** 2)]))), r"not mean and logvar"),
        (changed(LAST, npy(np.array([{}]))), r"cannot use .*06\.npy .*pickle"),
        (changed(LAST, b"torn"), r"cannot use .*06\.npy"),
        (changed(LAST, npy(moments()[0])), r"moments of image 6 are .* away from what autoencoder\.path makes of it"),
    ],
)
def test_moments_that_do_not_fit(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    for name in ("a", "b.zip"):
        write(tmp_path / "images", image_files())
        latents = write(tmp_path / f"vae-sd-{name}", files)
        run = config(tmp_path / "images", latents=str(latents))
        with pytest.raises(UserError, match=message):
            prepare(run, Needs(), "cpu").moments.rows(np.arange(NUM))


def test_moments_of_another_range_of_pixels_or_another_shape_are_refused(root: Path) -> None:
    """EDM2's own encoder scales pixels to [0, 1]; REPA's to [-1, 1]."""
    autoencoder = Autoencoder.load("digits", "cpu")
    half = [autoencoder.moments((picture // 2 + 128)[None]).numpy()[0] for picture in pictures()]
    names = [name for name in moment_files() if name.endswith(".npy")]
    wrong = write(root.parent / "wrong", dict(zip(names, map(npy, half), strict=True)))
    with pytest.raises(UserError, match=r"moments of image 0 are .*, with pixels from -1 to 1"):
        prepare(config(root, latents=str(wrong)), Needs(), "cpu")
    small = write(root.parent / "small", {name: npy(moments()[0, :, :2, :2]) for name in names})
    with pytest.raises(UserError, match=r"moments are \(8, 2, 2\), autoencoder\.path makes \(8, 4, 4\)"):
        prepare(config(root, latents=str(small)), Needs(), "cpu")


def test_another_size_and_a_missing_place_are_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.image_size is 32: .* are read as they are, so give 16"):
        load(root, image_size=32)
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not there"):
        load(root / "nowhere")
    with pytest.raises(UserError, match=r"data\.latents: .*nowhere is not there"):
        load(root, latents=str(root / "nowhere"))
    (root / "a.zip").write_bytes(b"no zip")
    with pytest.raises(UserError, match=r"a\.zip is neither a folder nor a zip"):
        load(root / "a.zip")


def test_pictures_that_are_no_square_and_torn_ones_are_named(tmp_path: Path) -> None:
    files = image_files()
    content = io.BytesIO()
    Image.new("RGB", (16, 8)).save(content, format="png")
    for bad, message in ((content.getvalue(), "16 x 8 pixels, which is no square"), (b"torn", "cannot identify")):
        images = write(tmp_path / "images", {**files, "00000/img00000002.png": bad})
        with pytest.raises(UserError, match=rf"cannot use .*img00000002\.png .*{message}"):
            load(images).rows(np.arange(NUM))


def test_a_file_that_unpacks_to_more_than_memory_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocessed, "MAX_MEMBER_BYTES", 2**20)
    write(tmp_path / "images.zip", image_files())
    with zipfile.ZipFile(tmp_path / "images.zip", "a", compression=zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("00000/img00000000.npy", bytes(2**20 + 1))
    images = preprocessed.Archive.open(tmp_path / "images.zip", frozenset({".npy"}))
    assert (tmp_path / "images.zip").stat().st_size < 2**17
    with pytest.raises(UserError, match=r"img00000000\.npy \(it unpacks to more than 1 MiB\)"):
        images.read(images.names[0])
