"""Files from elsewhere: nothing in them is executed, and nothing is written outside the folders that were named.

The source is held to it with `ast`, and every path by which a file is loaded gets a malicious one. ditbench unpacks no
archive onto the disk; were it to, the first test would say so.
"""

import ast
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from harness.config import DataConfig
from harness.data import cache, pictures
from harness.data import images as data
from harness.errors import UserError
from harness.frozen import weights
from harness.frozen.autoencoder import ASSETS, WEIGHTS, Autoencoder
from harness.frozen.encoders import FrozenEncoder
from harness.records import run_folder
from harness.records.files import file_digest, write_json
from harness.training import checkpoint
from studies import cli
from tests.unit.test_architecture import calls

ROOT = Path(__file__).parents[3]
FOLDERS = ("harness", "methods", "studies", "reports")

# -- the source -------------------------------------------------------------------------------------------------------

FORBIDDEN = re.compile(
    r"(_?pickle|cPickle|cloudpickle|joblib|dill|shelve|marshal|tarfile|torch\.(hub|package|jit))(\.\w+)*"
)
"""Modules that execute what they read, or whose archives need care; members of a zip are read in memory."""
UNSAFE = re.compile(
    r"eval|exec|shutil\.unpack_archive|pandas\.read_pickle|yaml\.(load|load_all|full_load|unsafe_load)"
    r"|\S+\.(extractall|load_state_dict_from_url)|(?!harness\.)\S+\.extract"
)
SAFE_KEYWORDS = {
    "torch.load": {"weights_only": True},
    "numpy.load": {"allow_pickle": False},
    "numpy.lib.format.read_array": {"allow_pickle": False},
    "diffusers.AutoencoderKL.from_pretrained": {"use_safetensors": True, "local_files_only": True},
}
"""Loaders, and what each call of them must say."""


def unsafe_loading(source: str) -> list[str]:
    """Imports and calls by which a file could execute code or an archive be unpacked."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if FORBIDDEN.fullmatch(alias.name)]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in names if FORBIDDEN.fullmatch(name)]
    for name, call in calls(tree):
        said = {word.arg: word.value.value for word in call.keywords if isinstance(word.value, ast.Constant)}
        wanted = SAFE_KEYWORDS.get(name, {})
        if UNSAFE.fullmatch(name) or any(said.get(word) is not value for word, value in wanted.items()):
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from pickle import loads", ["pickle.loads"]),
        ("import torch.hub as h", ["torch.hub"]),
        ("from torch import hub", ["torch.hub"]),
        ("import joblib.numpy_pickle", ["joblib.numpy_pickle"]),
        ("import torch\ntorch.load(f)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=False)", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=safe)", ["torch.load"]),
        ("from torch import load\nload(f, map_location='cpu')", ["torch.load"]),
        ("import torch\ntorch.load(f, weights_only=True)", []),
        ("import numpy as np\nnp.load(f)", ["numpy.load"]),
        ("import numpy as np\nnp.load(f, allow_pickle=True)", ["numpy.load"]),
        ("import numpy as np\nnp.load(f, allow_pickle=False)", []),
        (
            "from diffusers import AutoencoderKL\nAutoencoderKL.from_pretrained(f, use_safetensors=True)",
            ["diffusers.AutoencoderKL.from_pretrained"],
        ),
        ("import shutil\nshutil.unpack_archive(f)", ["shutil.unpack_archive"]),
        ("import tarfile", ["tarfile"]),
        ("archive.extractall()", ["archive.extractall"]),
        ("import zipfile\nzipfile.ZipFile(f).read(name)", []),
        ("archive.extract(name)", ["archive.extract"]),
        ("from harness import fidelity\nfidelity.extract(images)", []),
        ("import yaml\nyaml.load(f, Loader=yaml.Loader)", ["yaml.load"]),
        ("import yaml\nyaml.safe_load(f)", []),
        ("eval(text)", ["eval"]),
        ("network.eval()", []),
        ("import json\njson.load(f)", []),
    ],
)
def test_unsafe_loading_is_found(source: str, found: list[str]) -> None:
    assert unsafe_loading(source) == found


def test_no_source_loads_unsafely_or_unpacks_archives() -> None:
    sources = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 40
    found = {str(path.relative_to(ROOT)): unsafe_loading(path.read_text()) for path in sources}
    assert {path: names for path, names in found.items() if names} == {}


# -- every path by which a file is loaded -----------------------------------------------------------------------------


class Evil:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


class Attack:
    """Writes malicious files, and knows whether one was executed."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "executed"
        self._forms: dict[str, Callable[[Path], object]] = {
            "pickle": lambda path: path.write_bytes(pickle.dumps(Evil(self.mark), protocol=2)),
            "torch": lambda path: torch.save({"w": torch.ones(2), "x": Evil(self.mark)}, path),
            "npy": lambda path: self._save(np.save, path),
            "npz": lambda path: self._save(np.savez, path),
        }

    def _save(self, save: Callable[..., None], path: Path) -> None:
        with path.open("wb") as file:
            save(file, np.array([Evil(self.mark)], dtype=object))

    def forms(self, path: Path) -> Iterator[str]:
        """Write each kind of malicious file to `path` in turn."""
        for name, write in self._forms.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            yield name

    def refused(self, load: Callable[[], object], path: Path, message: str) -> None:
        """Assert that each kind of malicious file at `path` is refused by one line and not executed."""
        for form in self.forms(path):
            with pytest.raises(UserError, match=message) as caught:
                load()
            assert "\n" not in str(caught.value), form
            assert not self.mark.exists(), form


@pytest.fixture
def attack(tmp_path: Path) -> Attack:
    return Attack(tmp_path)


def test_the_attacks_work_on_careless_loaders(attack: Attack, tmp_path: Path) -> None:
    """Else none of the tests below could fail."""
    careless: dict[str, Callable[[Path], Any]] = {
        "pickle": lambda path: pickle.loads(path.read_bytes()),
        "torch": lambda path: torch.load(path, weights_only=False),
        "npy": lambda path: np.load(path, allow_pickle=True),
        "npz": lambda path: np.load(path, allow_pickle=True)["arr_0"],
    }
    for form in attack.forms(tmp_path / "file"):
        careless[form](tmp_path / "file")
        assert attack.mark.exists(), form
        attack.mark.unlink()


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".npy", ".npz", ".safetensors"])
def test_pretrained_weights(attack: Attack, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    attack.refused(lambda: weights.load_tensors(path), path, rf"weights\{suffix} is not a file of plain weights \(\S")


@pytest.mark.parametrize("value", [[1, 2], {"w": torch.ones(1), "args": {"lr": 1.0}}, torch.ones(2)])
def test_pretrained_weights_that_are_no_named_tensors(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth is not a file of plain weights \(it holds more than named tensors\)"):
        weights.load_tensors(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2", "dinov2_vits14", "dinov2_vits14_reg"])
@pytest.mark.parametrize("suffix", weights.SUFFIXES)
def test_encoders(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str) -> None:
    monkeypatch.setenv("DITBENCH_WEIGHTS", str(tmp_path))
    attack.refused(lambda: FrozenEncoder.load(name, 2, "cpu"), tmp_path / f"{name}{suffix}", "not a file of plain")


@pytest.fixture
def autoencoder(tmp_path: Path) -> Path:
    """A copy of the shipped autoencoder."""
    return Path(shutil.copytree(ASSETS / "digits_autoencoder", tmp_path / "ae"))


def test_autoencoder_weights(attack: Attack, autoencoder: Path) -> None:
    load = lambda: Autoencoder.load(str(autoencoder), "cpu")  # noqa: E731
    attack.refused(load, autoencoder / WEIGHTS, rf"{WEIGHTS} is not a file of plain weights")
    attack.refused(load, autoencoder / "config.json", r"config\.json is not valid JSON")


def test_an_autoencoder_with_pickled_weights_alone(attack: Attack, autoencoder: Path) -> None:
    (autoencoder / WEIGHTS).unlink()
    pickled = autoencoder / "diffusion_pytorch_model.bin"
    attack.refused(lambda: Autoencoder.load(str(autoencoder), "cpu"), pickled, r"\.bin is not a file of plain weights")


@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pth", "ckpt"])
def test_an_autoencoder_in_one_file(attack: Attack, tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"vae.{suffix}"
    attack.refused(lambda: Autoencoder.load(str(file), "cpu"), file, rf"{suffix} is not a file of plain weights")


def test_pickled_weights_beside_an_autoencoder_are_not_read(attack: Attack, autoencoder: Path) -> None:
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt"):
        for _ in attack.forms(autoencoder / name):
            assert Autoencoder.load(str(autoencoder), "cpu").digest == Autoencoder.load("digits", "cpu").digest
    assert not attack.mark.exists()


def test_an_autoencoders_index_to_other_files_is_refused(attack: Attack, autoencoder: Path) -> None:
    """diffusers would load the file that it names, wherever that lies, in place of the weights that were hashed."""
    evil = autoencoder.parent / "evil.bin"
    index = {"metadata": {}, "weight_map": {"encoder.conv_in.weight": f"../{evil.name}"}}
    write_json(autoencoder / f"{WEIGHTS}.index.json", index)
    attack.refused(lambda: Autoencoder.load(str(autoencoder), "cpu"), evil, r"index\.json splits the weights")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"AutoencoderKL"'])
def test_an_autoencoders_config_of_another_form(autoencoder: Path, content: str) -> None:
    (autoencoder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is no config of a network"):
        Autoencoder.load(str(autoencoder), "cpu")


def folder_config(root: Path) -> DataConfig:
    return DataConfig(name="imagefolder", path=str(root), image_size=16)


def test_images(attack: Attack, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for number, suffix in enumerate(sorted(pictures.EXTENSIONS)):
        path = root / "a" / f"x{suffix}"
        load = lambda number=number: data.load_images(folder_config(root), tmp_path / str(number))  # noqa: E731
        attack.refused(load, path, rf"cannot read image .*x\{suffix}")
        path.unlink()


def test_other_files_among_the_images_are_not_read(attack: Attack, tmp_path: Path) -> None:
    root = tmp_path / "images"
    for name in ("x.pt", "x.npy", "x.npz", "x.pkl", "labels.bin"):
        for _ in attack.forms(root / "a" / name):
            with pytest.raises(UserError, match="has no images"):
                data.load_images(folder_config(root), tmp_path / "cache")
    assert not attack.mark.exists()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A finished cache of one shard."""
    return build_shard(tmp_path / "c").folder


def build_shard(folder: Path) -> cache.Sharded:
    return cache.build(folder, {}, 4, (2,), np.int64, lambda start, stop: np.ones((stop - start, 2), np.int64))


def test_shards(attack: Attack, shards: Path) -> None:
    for _ in attack.forms(shards / "shard-00000.npy"):
        assert build_shard(shards).rows(np.arange(4)).tolist() == [[1, 1]] * 4, "made again, not read"
    assert not attack.mark.exists()


def test_shards_whose_checksum_was_entered_too(attack: Attack, shards: Path) -> None:
    path = shards / "shard-00000.npy"

    def load() -> None:
        index = cache.read_small(shards / cache.INDEX)
        cache.write_small(shards / cache.INDEX, {**index, "checksums": [file_digest(path)]})
        build_shard(shards).rows(np.arange(4))

    attack.refused(load, path, r"shard-00000\.npy is no array of plain numbers")


def test_small_caches(attack: Attack, tmp_path: Path, shards: Path) -> None:
    for path in (shards / cache.INDEX, tmp_path / "files-0123456789ab.json"):
        for _ in attack.forms(path):
            assert cache.read_small(path) is None
    assert not attack.mark.exists()


def test_the_list_of_image_files(attack: Attack, tmp_path: Path) -> None:
    root, told = tmp_path / "images", []
    (root / "a").mkdir(parents=True)
    Image.new("RGB", (16, 16)).save(root / "a" / "x.png")
    first = data.load_images(folder_config(root), tmp_path / "cache")
    (listing,) = (tmp_path / "cache").glob("files-*.json")
    for _ in attack.forms(listing):
        again = data.load_images(folder_config(root), tmp_path / "cache", lambda *line: told.append(line[0]))
        assert again.digest == first.digest
        assert told[0] == f"{listing} is damaged and is made again"
        told.clear()
    assert not attack.mark.exists()


@pytest.mark.parametrize("name", [*(f"{group}.safetensors" for group in checkpoint.GROUPS), "state.json"])
def test_checkpoints(attack: Attack, tmp_path: Path, name: str) -> None:
    tensors = {group: {"w": torch.ones(2)} for group in checkpoint.GROUPS}
    checkpoint.save(tmp_path, "step_00000004", tensors, checkpoint.Counters(step=4))
    folder = tmp_path / "step_00000004"
    attack.refused(lambda: checkpoint.load(folder), folder / name, rf"{name} is damaged")


def test_ema_backbones(attack: Attack, tmp_path: Path) -> None:
    attack.refused(lambda: checkpoint.load_ema(tmp_path), checkpoint.ema_path(tmp_path, 4), "is damaged")


def test_manifests(attack: Attack, tmp_path: Path) -> None:
    run = run_folder.RunFolder(tmp_path / "study" / "cell" / "seed0")
    attack.refused(run.manifest, run.manifest_path, r"manifest\.json is not valid JSON")


def test_configs(attack: Attack, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"study: !!python/object/apply:os.mkdir [{attack.mark}]\n")

    def refused() -> None:
        assert cli.main(["train", "--config", str(path)]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.count("\n") == 1
        assert not attack.mark.exists()

    refused()
    yaml.unsafe_load(path.read_text())
    assert attack.mark.exists(), "the file does nothing, so this test could not fail"
    attack.mark.rmdir()
    for _ in attack.forms(path):
        refused()


# -- where files are written ------------------------------------------------------------------------------------------

HOSTILE = (
    *("a..b", "q'uo\"te", "new\nline", "<script>", "ünïcödé", "-rf", "$(touch executed)", "`touch executed`;"),
    *("C:\\x", "%2e%2e%2f", "~", " ", "%00", "{0}", "a" * 255, os.fsdecode(b"\xff\xfe")),
)
"""Names of class folders."""


def snapshot(folder: Path) -> dict[Path, tuple[Any, ...]]:
    """Every name below a folder with its kind, content and time of change."""
    found: dict[Path, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[path] = (state.st_mode, state.st_mtime_ns, content, path.readlink() if path.is_symlink() else "")
    return found


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images with hostile names and links, beside others that nothing may be written to."""
    rng = np.random.default_rng(0)
    root, outside = tmp_path / "place" / "images", tmp_path / "outside"
    for folder in (*(root / name for name in HOSTILE), outside):
        folder.mkdir(parents=True)
        for name in ("one.png", "two\n'\".png"):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name, format="PNG")
    (root / "out of the tree").symlink_to(outside)
    (root / "broken").symlink_to(tmp_path / "nowhere")
    (root / "loop").symlink_to(root / "loop")
    (root / "a..b" / "up").symlink_to(root)
    (root / "a..b" / "outside.png").symlink_to(outside / "one.png")
    (root / "..hidden").mkdir()
    monkeypatch.chdir(root.parent)
    return root


def prepare(root: Path, place: Path) -> int:
    words = ["prepare", "--config", "digits", "--data.name", "imagefolder", "--data.path", str(root)]
    sizes = ["--evaluation.num_samples", "8", "--evaluation.kid_subset", "4", "--evaluation.velocity_images", "4"]
    return cli.main([*words, *sizes, "--output.cache", str(place / "cache"), "--output.runs", str(place / "runs")])


def test_hostile_names_and_links_write_nothing_outside_the_cache(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(tmp_path)
    assert prepare(hostile, hostile.parent) == 0, capsys.readouterr().err
    cached = hostile.parent / "cache"
    after = snapshot(tmp_path)
    new = set(after) - set(before)
    assert new and all(path == cached or cached in path.parents for path in new)
    # The folder that the cache was made in is the only one whose time of change moved.
    assert {path for path in before if after[path] != before[path]} == {hostile.parent}
    names = [path.relative_to(cached).as_posix() for path in new - {cached}]
    assert all(re.fullmatch(r"[a-z]+-[\w-]+(\.json|/(index\.json|shard-\d{5}\.npy))?", name) for name in names), names
    assert not any(path.is_symlink() for path in new)

    images = data.load_images(folder_config(hostile), cached)
    assert set(images.class_names) == {*HOSTILE, "out of the tree"}
    assert len(images) == 2 * len(images.class_names) + 1, (
        "the file behind the link in a..b, and no link followed twice"
    )


@pytest.mark.parametrize(
    ("target", "reason"), [("x.png", "Too many levels of symbolic links"), ("gone.png", "No such file or directory")]
)
def test_a_file_link_that_leads_nowhere_is_named(tmp_path: Path, target: str, reason: str) -> None:
    root = tmp_path / "images"
    (root / "a").mkdir(parents=True)
    (root / "a" / "x.png").symlink_to(target)
    with pytest.raises(UserError, match=rf"data\.path: cannot read .*a/x\.png \({reason}\)"):
        data.load_images(folder_config(root), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "name", ["..", ".", "../up", "/absolute", "a/../../b", "a\\b", "new\nline", "nul\0", ".hidden"]
)
@pytest.mark.parametrize("option", ["--study", "--cell"])
def test_names_of_studies_and_cells_stay_in_their_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "--config", "digits", "--output.runs", str(tmp_path / "in" / "runs"), f"{option}={name}"]
    assert cli.main(words) == 2
    assert re.search(f"{option[2:]} is .* it names a folder", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []
