"""Distances against hand-computed values and slow independent formulas, through torch-fidelity's own path.

The test's extractor has two features, the mean of red and of green, and the test's images are of one colour: so the
features are the numbers that the test writes down.
"""

import dataclasses
import itertools
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from harness.data.image_set import evenly_spaced_rows
from harness.errors import UserError
from harness.evaluation import extractors, fidelity
from harness.evaluation.extractors import Extractor
from harness.evaluation.fidelity import Features, Pictures, Reference, extract

NAME = "test-red-green"
CPU = torch.device("cpu")
EXTRACTOR = Extractor(name=NAME, label="red_green", family="", width=2, layer="mean")


class RedGreen(FeatureExtractorBase):
    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("mean", "doubled", "logits")

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "mean"

    def forward(self, images):
        mean = images.float().mean(dim=(2, 3))[:, :2]
        found = {"mean": mean, "doubled": 2 * mean, "logits": mean / 4}
        return tuple(found[name] for name in self.features_list)


if NAME not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(NAME, RedGreen)


class Counting(Pictures):
    """Counts how often an image is read."""

    def __init__(self, points):
        images = np.zeros((len(points), 2, 2, 3), np.uint8)
        images[..., :2] = np.asarray(points, np.uint8)[:, None, None, :]
        self.reads = 0
        super().__init__(lambda i: images[i], len(points))

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


def reference(points, cache: Path, name: str = "points") -> Reference:
    return Reference(pictures=Counting(points), name=name, device=CPU, cache=cache)


def frechet(real: Reference, ours: Pictures) -> float:
    """The distance of pictures' features alone."""
    return real.frechet(EXTRACTOR, extract(EXTRACTOR, ("mean",), ours, CPU)["mean"])


def distances(real: Reference, points, kid_subset: int, extractor: Extractor = EXTRACTOR) -> dict[str, float]:
    """All that is said of pictures."""
    return real.distances(extractor, extract(extractor, extractor.layers, Counting(points), CPU), kid_subset)


SQUARE = [(10, 10), (10, 14), (14, 10), (14, 14)]


def test_pictures_are_channels_first():
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    image.flags.writeable = False  # as Pillow's and a memory map's are; torch would warn
    picture = Pictures(lambda i: image, 1)[0]
    assert picture.shape == (3, 2, 4) and picture.dtype == torch.uint8
    assert picture[2, 1, 3] == image[1, 3, 2]


def test_frechet_distance_by_hand(tmp_path):
    """Corners of squares: side 4 and side 8, centres (12, 12) and (24, 14).

    Sample variances (n - 1) of a coordinate are 4 * 2^2 / 3 and 4 * 4^2 / 3, coordinates are uncorrelated, so
    FD = 12^2 + 2^2 + 2 (sqrt(64/3) - sqrt(16/3))^2 = 148 + 2 * 16/3.
    """
    large = [(20, 10), (20, 18), (28, 10), (28, 18)]
    assert frechet(reference(SQUARE, tmp_path), Counting(large)) == pytest.approx(148 + 32 / 3, rel=1e-6)


def test_distances_share_the_frechet_distance(tmp_path):
    large = [(20, 10), (20, 18), (28, 10), (28, 18)]
    found = distances(reference(SQUARE, tmp_path), large, 4)
    assert found["fd"] == pytest.approx(148 + 32 / 3, rel=1e-6)


def statistics_of_the_large_square() -> dict[str, np.ndarray]:
    """Corners (20, 10) ... (28, 18): centre (24, 14), and 4 * 4^2 / 3 for each of two uncorrelated coordinates."""
    return {"mu": np.array([24.0, 14.0]), "sigma": np.diag([64 / 3, 64 / 3])}


def test_stored_statistics_alone_give_the_frechet_distance_alone(tmp_path):
    real = Reference(
        pictures=None, name="stored", device=CPU, cache=tmp_path, statistics={"fd": statistics_of_the_large_square()}
    )
    found = distances(real, SQUARE, 4)
    assert found == {"fd": pytest.approx(148 + 32 / 3, rel=1e-6)}


def test_stored_statistics_count_instead_of_those_of_the_images(tmp_path):
    """As in an ADM batch: statistics of the whole data set, and some of its images for precision and recall."""
    plain = reference(SQUARE, tmp_path)
    both = dataclasses.replace(plain, statistics={"fd": statistics_of_the_large_square()})
    alone, found = (distances(real, SQUARE, 4) for real in (plain, both))
    assert alone["fd"] == pytest.approx(0, abs=1e-6)
    assert found["fd"] == pytest.approx(148 + 32 / 3, rel=1e-6)
    assert {**found, "fd": 0} == {**alone, "fd": 0}


class Evil:
    """Pickles to a call that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def points_of(seed: int, num: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 12, (num, 2))


def slow_kernel_distance(xs, ys) -> float:
    """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (arXiv 1801.01401, section 4)."""

    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    def within(points):
        pairs = [k(a, b) for (i, a), (j, b) in itertools.product(enumerate(points), repeat=2) if i != j]
        return sum(pairs) / len(pairs)

    across = [k(a, b) for a in xs for b in ys]
    return within(xs) + within(ys) - 2 * sum(across) / len(across)


def test_kernel_distance_against_a_slow_formula(tmp_path):
    """A subset as large as the sets: every subset is the whole set."""
    generated, real = points_of(0, 12), points_of(1, 12)
    found = distances(reference(real, tmp_path), generated, 12)
    assert found["kd"] == pytest.approx(slow_kernel_distance(generated, real), rel=1e-3)


def slow_precision_recall(generated, real, k=3) -> tuple[float, float]:
    """Share of one set within reach of the other's points; a point reaches to its k-th neighbour (1904.06991)."""

    def dist(a, b):
        return float(np.hypot(*(np.asarray(a, float) - b)))

    def covered(points, by):
        reach = [sorted(dist(a, b) for b in by)[k] for a in by]
        return np.mean([any(dist(p, a) <= r for a, r in zip(by, reach, strict=True)) for p in points])

    return covered(generated, real), covered(real, generated)


def test_precision_and_recall_against_a_slow_formula(tmp_path):
    """A cramped generator: all its points are within the real ones' reach, few real ones within its own."""
    real = [(10 * i, 20 * (i % 3)) for i in range(12)]
    generated = [(30 + i, 2 + i % 2) for i in range(9)]
    found = distances(reference(real, tmp_path), generated, 9)
    precision, recall = slow_precision_recall(generated, real)
    assert (precision, recall) != (1, 1) and precision > recall
    assert (found["precision"], found["recall"]) == (pytest.approx(precision), pytest.approx(recall))


def test_spatial_distance_is_the_frechet_distance_of_its_own_layer(tmp_path):
    """Twice the features: four times the distance."""
    both = dataclasses.replace(EXTRACTOR, spatial="doubled")
    large = [(20, 10), (20, 18), (28, 10), (28, 18)]
    found = distances(reference(SQUARE, tmp_path), large, 4, both)
    assert found["fd"] == pytest.approx(148 + 32 / 3, rel=1e-6)
    assert found["sfd"] == pytest.approx(4 * (148 + 32 / 3), rel=1e-6)


def test_inception_score_against_a_slow_formula(tmp_path):
    """exp of the mean divergence of p(y|x) from p(y), in each of 10 parts (1606.03498, section 4)."""
    scored = dataclasses.replace(EXTRACTOR, logits="logits")
    points = points_of(0, 34)
    found = distances(reference(SQUARE, tmp_path), points, 4, scored)["is"]
    order = np.random.RandomState(2020).permutation(34)
    scores = []
    for part in range(10):
        logits = [points[i] / 4 for i in order[part * 34 // 10 : (part + 1) * 34 // 10]]
        given = [np.exp(row) / sum(np.exp(row)) for row in logits]
        whole = sum(given) / len(given)
        scores.append(
            np.exp(np.mean([sum(p * np.log(p / q) for p, q in zip(row, whole, strict=True)) for row in given]))
        )
    assert found == pytest.approx(np.mean(scores), rel=1e-6) and found > 1.1


def test_too_few_images_have_no_inception_score(tmp_path):
    scored = dataclasses.replace(EXTRACTOR, logits="logits")
    assert "is" not in distances(reference(SQUARE, tmp_path), points_of(0, 9), 4, scored)


def test_precision_and_recall_read_a_spread_of_a_large_reference(tmp_path, monkeypatch):
    """At most 6 of 12: every second one."""
    monkeypatch.setattr(fidelity, "MANIFOLD_IMAGES", 6)
    real = [(10 * i, 20 * (i % 3)) for i in range(12)]
    generated = [(30 + i, 2 + i % 2) for i in range(9)]
    found = distances(reference(real, tmp_path), generated, 9)
    wanted = slow_precision_recall(generated, real[::2])
    assert wanted != slow_precision_recall(generated, real)
    assert (found["precision"], found["recall"]) == (pytest.approx(wanted[0]), pytest.approx(wanted[1]))


def drawn(seed: int, num: int, width: int) -> torch.Tensor:
    """Features that are all positive and far from round, as a network's are."""
    return torch.rand((num, width), generator=torch.Generator().manual_seed(seed)) ** 2 + 0.1 * seed


def test_kernels_made_once_give_what_kernels_of_every_subset_give(monkeypatch):
    """In float64 over three parts of the rows; torch-fidelity sums each subset's in float32."""
    ours, theirs = drawn(1, 70, 40), drawn(2, 50, 40)
    found = {}
    for name, rows in (("whole", 1000), ("parts", 30)):
        monkeypatch.setattr(fidelity, "KERNEL_ROWS", rows)
        found[name] = fidelity.kernel_distance(ours, theirs, 45)
    settings = {"kid_subsets": 100, "kid_subset_size": 45, "rng_seed": 2020, "verbose": False}
    wanted = kid_features_to_metric(ours, theirs, **settings)[torch_fidelity.KEY_METRIC_KID_MEAN]
    assert found["whole"] == pytest.approx(wanted, rel=1e-5) and wanted > 0.01
    assert found["parts"] == pytest.approx(found["whole"], rel=1e-6)


def test_small_subsets_of_large_sets_are_torch_fidelitys(monkeypatch):
    """100 x 3 x 4^2 kernels in subsets, and 3 x 70^2 of all images."""
    monkeypatch.setattr(fidelity, "_kernel_sums", None)
    ours, theirs = drawn(1, 70, 6), drawn(2, 70, 6)
    settings = {"kid_subsets": 100, "kid_subset_size": 4, "rng_seed": 2020, "verbose": False}
    wanted = kid_features_to_metric(ours, theirs, **settings)[torch_fidelity.KEY_METRIC_KID_MEAN]
    assert fidelity.kernel_distance(ours, theirs, 4) == wanted


@pytest.mark.parametrize("num", [20, 300])
def test_frechet_distance_is_torch_fidelitys_but_for_rounding(num):
    """With fewer images than features, and with more."""
    ours, theirs = fid_features_to_statistics(drawn(1, num, 64)), fid_features_to_statistics(drawn(2, num, 64))
    wanted = fid_statistics_to_metric(ours, theirs, verbose=False)[torch_fidelity.KEY_METRIC_FID]
    moments = fidelity.Moments(theirs["mu"], theirs["sigma"], fidelity._root(theirs["sigma"]))
    assert fidelity.frechet(drawn(1, num, 64), moments) == pytest.approx(wanted, rel=1e-6)


def test_features_made_piece_by_piece_are_those_of_one_pass():
    """Whole batches of 32 as soon as their pictures are there; the real extractor, whose last bits depend on them."""
    extractor = extractors.find("efficientnet_lite0", 32)
    images = np.random.default_rng(0).integers(0, 256, (75, 16, 16, 3), np.uint8)
    features = Features([extractor, extractors.find_pixels()], 75, CPU)
    for start, stop, made in ((0, 10, 0), (10, 40, 32), (40, 50, 32), (50, 75, 75)):
        part_NHWC = images[start:stop].copy()
        features.add(part_NHWC)
        alive = weakref.ref(part_NHWC)
        del part_NHWC
        assert features._done == made and alive() is None, "what waits would keep all images"
    assert features.seconds > 0
    for each in (extractor, extractors.find_pixels()):
        whole = extract(each, each.layers, Pictures(images.__getitem__, 75), CPU)
        assert all(torch.equal(features.of(each)[layer], whole[layer]) for layer in each.layers)


def test_rows_are_spread_evenly():
    rows = np.array([3, 5, 8, 9, 12, 20])
    assert evenly_spaced_rows(rows, 3).tolist() == [3, 8, 12] and evenly_spaced_rows(rows, 9).tolist() == rows.tolist()


def test_equal_and_disjoint_sets_are_the_extremes(tmp_path):
    near, far = points_of(0, 8), points_of(1, 8) + 200
    equal = distances(reference(near, tmp_path), near, 8)
    assert (equal["precision"], equal["recall"]) == (1, 1)
    assert equal["fd"] == pytest.approx(0, abs=1e-6)
    apart = distances(reference(near, tmp_path), far, 8)
    assert (apart["precision"], apart["recall"]) == (0, 0) and apart["fd"] > 2 * 180**2


def test_the_numbers_are_those_of_one_call_of_torch_fidelity(tmp_path):
    """More images than are extracted at once, and a last batch that is not full."""
    generated, real = points_of(0, 150), points_of(1, 141)
    theirs = torch_fidelity.calculate_metrics(
        input1=Counting(generated),
        input2=Counting(real),
        feature_extractor=NAME,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=50,
        kid_subsets=100,
        prc_neighborhood=3,
        rng_seed=2020,
        batch_size=32,
        cache=False,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    names = {
        "fd": torch_fidelity.KEY_METRIC_FID,
        "kd": torch_fidelity.KEY_METRIC_KID_MEAN,
        "precision": torch_fidelity.KEY_METRIC_PRECISION,
        "recall": torch_fidelity.KEY_METRIC_RECALL,
    }
    found = distances(reference(real, tmp_path), generated, 50)
    rounding = {"fd": 1e-6, "kd": 1e-5, "precision": 0, "recall": 0}  # it sums kernels in float32
    assert found == {ours: pytest.approx(theirs[name], rel=rounding[ours]) for ours, name in names.items()}
    again = reference(real, tmp_path)  # from the cache
    assert distances(again, generated, 50) == found
    assert again.pictures.reads == 0


@pytest.mark.parametrize("kind", ["features", "statistics"])
def test_damaged_caches_of_the_reference_are_made_again(tmp_path, kind):
    real, points = points_of(0, 8), points_of(1, 8)
    first = distances(reference(real, tmp_path), points, 8)
    (shard,) = tmp_path.glob(f"{'statistics' if kind == 'statistics' else NAME}-*/shard-*.npy")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 64
    shard.write_bytes(content)
    notices: list[str] = []
    again = dataclasses.replace(reference(real, tmp_path), on_progress=lambda what, done, total: notices.append(what))
    assert distances(again, points, 8) == first
    assert notices[0] == f"{shard} is missing or damaged and is made again"
    assert (again.pictures.reads >= 8) is (kind == "features")


def test_torch_fidelitys_own_cache_is_neither_read_nor_written(tmp_path, monkeypatch):
    """It would unpickle what lies there: a file of its naming must not be opened."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    mark = tmp_path / "executed"
    folder, cache = tmp_path / "torch" / "fidelity_cache", tmp_path / "cache"
    for place in (folder, cache):
        place.mkdir(parents=True)
        for name in (f"points-{NAME}-features-mean.pt", f"points-{NAME}-stat-fid-mean.pt"):
            torch.save(Evil(mark), place / name)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    real = reference(points_of(0, 8), cache)
    distances(real, points_of(1, 8), 8)
    frechet(real, Counting(points_of(1, 8)))
    assert not mark.exists()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    torch.load(cache / f"points-{NAME}-features-mean.pt", weights_only=False)
    assert mark.exists(), "the files do nothing, so this test could not fail"


def test_reference_features_are_computed_once(tmp_path):
    real = reference(points_of(0, 8), tmp_path)
    first = distances(real, points_of(1, 8), 8)
    reads = real.pictures.reads
    assert reads >= 8
    again = reference(points_of(0, 8), tmp_path)
    assert distances(again, points_of(1, 8), 8) == first
    assert again.pictures.reads == 0


def test_the_reference_s_moments_are_computed_once(tmp_path, monkeypatch):
    """An evaluator that comes later reads them, and of its features what other distances need."""
    first = distances(reference(points_of(0, 8), tmp_path), points_of(1, 8), 8)
    monkeypatch.setattr(fidelity, "_root", None)
    again = reference(points_of(0, 8), tmp_path)
    assert distances(again, points_of(1, 8), 8) == first and again.pictures.reads == 0
    with pytest.raises(TypeError):  # else this test could not fail
        distances(reference(points_of(0, 8), tmp_path / "other"), points_of(1, 8), 8)


def test_another_name_is_another_cache(tmp_path):
    one = frechet(reference(points_of(0, 8), tmp_path), Counting(SQUARE))
    two = frechet(reference(points_of(3, 8), tmp_path, name="other"), Counting(SQUARE))
    assert one != two


def test_nothing_is_printed_and_no_global_state_is_drawn_from(tmp_path, capfd):
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    distances(reference(points_of(0, 8), tmp_path), points_of(1, 8), 4)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)


def test_unwritable_cache_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output\.cache: cannot write"):
        frechet(reference(SQUARE, tmp_path / "file" / "features"), Counting(SQUARE))
