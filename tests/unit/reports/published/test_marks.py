"""Published marks: which rows of the file fit a study, and what is said of them. Values are typed from the file."""

import dataclasses
from collections import Counter

import pandas as pd
import pytest

from reports.figures.curves import metric_curves
from reports.published import marks as published_marks
from reports.published.marks import marks, with_marks
from reports.study.load import final_study, load_study
from tests.unit.reports.records_factory import (
    FINAL,
    MAIN,
    edit_manifest,
    enlarge,
    run_folder,
    write_final_study,
    write_run,
    write_study,
)

B2 = [
    ("repa", 24.4, 102_400_000, 1),
    *(("reg", fid, images, 2) for fid, images in ((64.7, 12_800_000), (36.1, 25_600_000), (22.1, 51_200_000))),
    ("reg", 15.2, 102_400_000, 2),
    *(("haste", fid, 102_400_000, 3) for fid in (21.3, 19.6)),
    *(("repa", fid, 25_600_000, 4) for fid in (49.5, 54.92)),
    *(("haste", fid, 25_600_000, 5) for fid in (39.86, 38.69, 48.74)),
    *(("haste", fid, 38_400_000, 5) for fid in (38.36, 36.13)),
    *(("haste", fid, images, 6) for fid, images in ((25.7, 51_200_000), (19.6, 102_400_000))),
    ("sit", 36.49, 102_400_000, 7),
    *(("dispersive", fid, 102_400_000, 8) for fid in (32.35, 32.64)),
]
"""What authors print themselves of SiT-B/2 without guidance, in the order of the file: method, FID, images, number."""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_final_study(tmp_path_factory.mktemp("runs"), seeds=(0,))


@pytest.fixture
def study(written):
    return load_study(written)


def final(study, published="main"):
    found = final_study(dataclasses.replace(study, published=published))
    assert found is not None
    return found


def test_marks_are_what_the_authors_print_of_the_same_size_and_metric(study):
    found = marks(final(study), "fid50k")
    assert [(mark.row["method"], mark.value, mark.images, mark.number) for mark in found] == B2
    own = {"sit": "sit", "repa": "repa"}
    assert {mark.row["method"]: mark.cell for mark in found} == own | {"reg": "", "haste": "", "dispersive": ""}
    first, ode = found[0], found[-1]
    assert first.label == "REPA Table 3 (primary): SDE Euler-Maruyama, 250 steps, no guidance"
    assert ode.label == "Dispersive repository README (primary): ODE, no guidance"


def test_none_and_all_are_there_when_asked_for(study):
    assert marks(final(study, "none"), "fid50k") == []
    found = marks(final(study, "all"), "fid50k")
    assert len(found) == 69
    standings = Counter(mark.standing for mark in found)
    assert {"primary", "primary, quoted", "secondary, ablation", "digitised", "unverified"} <= standings.keys()
    (ablated,) = [mark for mark in found if mark.value == 28.89]
    assert (ablated.row["method"], ablated.cell, ablated.standing) == ("vae_repa", "vae_repa", "secondary, ablation")
    (heard,) = [mark for mark in found if mark.value == 27.33]
    assert heard.label == "gstoica27/DeltaFM#6 (unverified): sampler not stated, no guidance"


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_classes": 10}, "fid50k"),
        ({"num_classes": 999}, "fid50k"),
        ({"side": 32}, "fid50k"),
        ({"side": 512}, "fid50k"),
        ({"name": "SiT-S/2"}, "fid50k"),
        ({"name": "SiT-B/4"}, "fid50k"),
        ({}, "fid5k"),
        ({}, "fd_inception_unverified_50k"),
    ],
)
def test_another_size_data_set_or_metric_has_no_marks(tmp_path, changes, name):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,))
    enlarge(run_folder(path, "sit", 0))
    unguided = load_study(path)
    assert len(marks(unguided, "fid50k")) == len(B2)
    enlarge(run_folder(path, "sit", 0), **changes)
    for published in ("main", "all"):
        assert marks(dataclasses.replace(load_study(path), published=published), name) == []


def test_the_embedded_data_never_has_marks(tmp_path):
    study = dataclasses.replace(load_study(write_study(tmp_path, {"sit": "sit"}, seeds=(0,))), published="all")
    assert all(marks(study, name) == [] for name in (*study.metrics, "fid50k", "is50k"))


def test_runs_of_which_the_number_of_classes_is_not_on_record_have_no_marks(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,))
    folder = run_folder(path, "sit", 0)
    enlarge(folder)
    manifest = folder.manifest()
    del manifest["model"]["num_classes"]
    folder.write_manifest({name: value for name, value in manifest.items() if name != "format"})
    assert marks(load_study(path), "fid50k") == []


def test_guided_runs_stand_beside_guided_ones(tmp_path):
    guided = {"kind": "sde-euler-maruyama", "num_steps": 250, "cfg_scale": 1.8}
    path = write_final_study(tmp_path, seeds=(0,), sampler=guided)
    for cell in FINAL:
        enlarge(run_folder(path, cell, 0), name="SiT-XL/2")
    study = load_study(path)
    found = marks(final(study), "fid50k")
    assert len(found) == 29
    assert {mark.row["cfg"] for mark in found}.isdisjoint({"none"})
    assert [(m.value, m.guidance) for m in found if m.row["source"] == "REPA Table 4"] == [
        (2.06, "guidance 1.5"),
        (1.96, "guidance, scale not printed"),
        (1.8, "guidance, scale not printed"),
        (1.42, "guidance 1.8"),
    ]
    # The protocol of the curves is not guided.
    assert len(marks(study, "fid50k")) == 29
    assert {mark.row["cfg"] for mark in marks(study, "fid50k")} == {"none"}


def test_cells_that_share_a_method_claim_none_of_its_marks(written, tmp_path):
    path = write_final_study(tmp_path, seeds=(0,))
    write_run(tmp_path, "imagenet", "repa,block=2", "repa", 0, "sit")
    enlarge(run_folder(path, "repa,block=2", 0))
    assert {mark.cell for mark in marks(final(load_study(path)), "fid50k")} == {"sit", ""}


# -- frames and tables ------------------------------------------------------------------------------------------------


def test_curves_hold_the_marks_within_the_runs_at_their_images(study):
    frame = metric_curves(study, MAIN)
    both = with_marks(frame, study, "fid50k")
    pd.testing.assert_frame_equal(both[: len(frame)][frame.columns], frame)
    rows = both[both["series"] == "published"]
    assert list(zip(rows["method"], rows["value"], rows["images"], rows["mark"], strict=True)) == B2
    assert rows["step"].tolist() == [images // 256 for _, _, images, _ in B2]
    assert published_marks.caption(both).endswith("and so not comparable to the digit.")
    assert published_marks.caption(frame) == ""


def test_marks_beyond_the_runs_are_left_out_of_the_curves(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,))
    enlarge(run_folder(path, "sit", 0))
    edit_manifest(run_folder(path, "sit", 0), config={"optimizer": {"batch_size": 128}})
    study = load_study(path)
    rows = with_marks(metric_curves(study, MAIN), study, "fid50k").query("series == 'published'")
    # 400,000 steps of 128 images have seen 51.2M: those of 102.4M images would stand at 800,000 steps.
    assert rows["images"].max() == 51_200_000
    assert rows["step"].max() == 400_000


def test_papers_print_no_gflops_or_seconds(tmp_path):
    path = write_study(tmp_path, {"sit": "sit"}, seeds=(0,))
    enlarge(run_folder(path, "sit", 0))
    edit_manifest(run_folder(path, "sit", 0), config={"budget": {"unit": "train_gflops", "amount": 1e9}})
    study = load_study(path)
    frame = metric_curves(study, MAIN)
    assert with_marks(frame, study, "fid50k") is frame


def test_the_table_says_of_every_mark_where_it_is_from(study):
    table = published_marks.table(final(study), ("fid50k", "is50k"))
    assert table is not None
    assert len(table.rows) == len(table.numbers) == 8 + 5
    assert table.rows[1] == {
        "mark": "2",
        "metric": "fid50k",
        "method": "reg",
        "published": "64.7, 36.1, 22.1, 15.2",
        "after images": "12.8M, 25.6M, 51.2M, 102.4M",
        "protocol": "SDE Euler-Maruyama, 250 steps, no guidance",
        "source": "REG Table 9, arXiv:2507.01467",
        "provenance": "primary",
        "notes": "",
    }
    assert table.rows[2]["notes"] == "21.3: never stopped; 19.6: tau 100K"
    assert table.numbers[1]["values"] == "64.7 36.1 22.1 15.2"
    assert table.numbers[1]["images"] == "12800000 25600000 51200000 102400000"
    assert "whether the images are ImageNet's is not on record" in table.notes[0]
    assert published_marks.table(final(study, "none"), ("fid50k",)) is None
