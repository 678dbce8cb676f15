"""The claims ledger: what a claim may say, against the methods' own settings and the published numbers."""

import csv
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

import methods
from harness.backbones.sit import SIZES, parse_name
from harness.method import BackboneShape
from harness.records.run_folder import UserError
from reports.claims.statements import CLAIMS, COUNTS, DEPTHS, Claim, ClaimedCell, Published, asked, load_ledger

LEDGER = load_ledger()
BY_ID = {claim.id: claim for claim in LEDGER.claims}


def sides(claim: Claim) -> list[ClaimedCell]:
    return [claim.cell, claim.against] if claim.against else [claim.cell]


# -- the shipped claims -----------------------------------------------------------------------------------------------


def test_what_the_papers_claim_is_there() -> None:
    assert {claim.paper for claim in LEDGER.claims} == {"VAE-REPA", "REPA", "SRA"}
    pairs = {
        (claim.cell.method, claim.against.method if claim.against else "", claim.kind, claim.direction)
        for claim in LEDGER.claims
    }
    assert pairs >= {
        ("vae_repa", "sit", "quality", "better"),
        ("repa", "sit", "quality", "better"),
        ("sra", "sit", "quality", "better"),
        ("repa+vae_repa", "repa", "quality", "better"),
        ("vae_repa", "vae_repa", "quality", "at least as good"),
        ("vae_repa", "sit", "count", "about"),
        ("vae_repa", "", "count", "about"),
        ("vae_repa", "repa", "seconds", "better"),
        ("vae_repa", "sra", "seconds", "better"),
        ("repa", "sit", "speed-up", "better"),
    }
    varied = {
        name
        for claim in LEDGER.claims
        if claim.against
        for name in claim.cell.fields.keys() & claim.against.fields.keys()
        if claim.cell.fields[name] != claim.against.fields[name]
    }
    assert varied >= {f"vae_repa.{name}" for name in ("block", "t_max", "loss", "head_layers", "weight")}
    losses = {c.against.fields["vae_repa.loss"] for c in LEDGER.claims if c.against and "as-good-as" in c.id}
    assert losses == {"cosine", "l1", "l2"}
    assert {claim.margin for claim in LEDGER.claims if claim.direction == "at least as good"} == {2}
    assert (BY_ID["vae-repa-4-percent-compute"].value, BY_ID["vae-repa-no-external-parameters"].value) == (4, 0)


PUBLISHED = CLAIMS.parent / "published"


def published_lines() -> list[dict[str, str]]:
    """All rows of all files; those of costs have no iterations."""
    return [line for path in sorted(PUBLISHED.glob("*.csv")) for line in csv.DictReader(path.read_text().splitlines())]


def printed(claim: Claim, row: Published) -> list[tuple[str, float, int]]:
    """Method, value and steps of every number of a row."""
    own = row.cell if row.difference is None else row.difference
    numbers = [] if own is None else [(claim.cell.method, own, row.steps)]
    if claim.against and row.against is not None:
        numbers.append((claim.against.method, row.against, row.against_steps or row.steps))
    return numbers


def test_every_published_number_stands_in_the_published_files() -> None:
    """And no claim has a better provenance than the best of its numbers."""
    lines, ranks = published_lines(), ("primary", "secondary", "digitised", "unverified")
    for claim in LEDGER.claims:
        provenances = []
        for row in claim.published:
            same = [line for line in lines if (line["source"], line["model"]) == (row.source, row.model)]
            assert same, (claim.id, row)
            for method, value, steps in printed(claim, row):
                found = [
                    line["provenance"]
                    for line in same
                    if (line["method"], float(line["value"] or "nan")) == (method, value)
                    and int(line.get("iterations", 0)) == steps
                ]
                assert found, (claim.id, row, method)
                provenances += found
        assert not provenances or ranks.index(claim.provenance) >= min(map(ranks.index, provenances)), claim.id


def test_the_factor_of_the_speed_up_is_what_the_table_gives() -> None:
    claim = BY_ID["repa-17.5-times-faster"]
    (row,) = claim.published
    assert claim.value == row.against_steps / row.steps == 17.5
    assert row.cell is not None and row.against is not None and row.cell <= row.against


# -- the claims and the methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("claim", LEDGER.claims, ids=lambda claim: claim.id)
@pytest.mark.parametrize("model", ["SiT-pico/2", "SiT-B/2", "SiT-XL/2"])
def test_every_setting_is_one_that_its_method_takes(claim: Claim, model: str) -> None:
    for setting in sides(claim):
        wanted = setting.asked(model)
        for part in setting.parts:
            fields = {name.partition(".")[2]: value for name, value in wanted.items() if name.startswith(f"{part}.")}
            config = methods.load(part).Config
            assert fields.keys() <= {field.name for field in dataclasses.fields(config)}
            made = config(**fields)
            assert all(getattr(made, name) == value for name, value in fields.items())
            space = {"loss"} & fields.keys()
            choices = {f.name: getattr(f.type, "__args__", ()) for f in dataclasses.fields(config)}
            assert all(fields[name] in choices[name] for name in space)
            for name in ("block", "teacher_block"):
                assert 1 <= fields.get(name, 1) <= parse_name(model)["depth"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", ["repa", "sra", "vae_repa"])
def test_the_papers_settings_are_the_methods_defaults(method: str, size: str) -> None:
    model = f"SiT-{size}/2"
    shape = BackboneShape(size=size, input_size=32, in_channels=4, num_classes=1000, **parse_name(model))
    found = methods.load(method)
    defaults = dataclasses.asdict(found.resolve(found.Config(), shape))
    wanted = next(c.cell for c in LEDGER.claims if c.cell.method == method and c.kind == "quality").asked(model)
    assert {name: defaults[name.partition(".")[2]] for name in wanted} == wanted


def test_depths_are_those_of_the_backbones() -> None:
    assert {name: depth for name, (depth, _, _) in SIZES.items()} == DEPTHS


@pytest.mark.parametrize(
    ("condition", "model", "value"),
    [
        (5, "SiT-B/2", 5),
        ("smooth_l1", "SiT-B/2", "smooth_l1"),
        ("6/12", "SiT-B/2", 6),
        ("6/12", "SiT-nano/2", 3),
        ("2/12", "SiT-XL/2", 5),  # 4.67
        ("1/12", "SiT-pico/2", 1),  # 0.33, and there is no block 0
        ({"XL": 8, "other": "2/12"}, "SiT-XL/2", 8),
        ({"XL": 8, "other": "2/12"}, "SiT-nano/2", 1),
    ],
)
def test_a_condition_for_a_backbone(condition: Any, model: str, value: Any) -> None:
    assert asked(condition, model) == value


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def edited(tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], Path]:
    """A ledger of the first claim, of the count of GFLOPs and of the speed-up, changed by a function."""

    def write(change: Callable[[dict[str, Any]], object]) -> Path:
        whole = yaml.safe_load(CLAIMS.read_text())
        kept = ("vae-repa-better-than-vanilla", "vae-repa-4-percent-compute", "repa-17.5-times-faster")
        whole["claims"] = [claim for claim in whole["claims"] if claim["id"] in kept]
        change(whole)
        path = tmp_path / "claims.yaml"
        path.write_text(yaml.safe_dump(whole, sort_keys=False))
        return path

    return write


def first(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda whole: whole["claims"][0].update(fields)


def without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda whole: whole["claims"][0].pop(name)


ROW: Mapping[str, Any] = {"source": "x", "model": "SiT-B/2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first(marginn=2), "claim vae-repa-better-than-vanilla: the key 'marginn' is not known .did you mean margin"),
        (lambda whole: whole.update(extra=1), "the key 'extra' is not known"),
        (lambda whole: whole["paper_scale"].update(imags=1), "paper_scale: the key 'imags' is not known .did you mean"),
        (lambda whole: whole["paper_scale"].update(images="many"), "images is 'many': give a number"),
        (first(published=[{**ROW, "stepss": 1}]), "published: the key 'stepss' is not known .did you mean steps"),
        (first(published=[{**ROW, "steps": "400K"}]), "steps is '400K': give a number"),
        (first(published=ROW), "is no list"),
        (without("provenance"), "claim vae-repa-better-than-vanilla: lacks provenance"),
        (without("against"), "against is missing: fid50k is of two cells"),
        (first(text=3), "text is 3: give text"),
        (first(kind="feeling"), "kind is 'feeling': give one of quality, speed-up, seconds, count"),
        (first(provenance="rumour"), "provenance is 'rumour'"),
        (first(direction="about"), "direction is 'about': a claim of the kind quality takes"),
        (first(direction="at least as good"), "margin is 0: give more than 0"),
        (first(margin=2), "margin is 2: give more than 0 with `at least as good`, and none with"),
        (first(metric="beauty"), "metric 'beauty' is not known"),
        (first(kind="seconds"), "metric is 'fid50k': a claim of the kind seconds takes step_ms"),
        (first(cell="vae_rapa"), "there is no setting 'vae_rapa': there are sit, repa"),
        (first(cell={"of": "vae_repa", "wiht": {}}), "the key 'wiht' is not known .did you mean with"),
        (first(cell={"of": "vae_repa", "with": {"repa.block": 1}}), "repa.block is no field of vae_repa"),
        (first(cell={"of": "vae_repa", "with": {"vae_repa.block": {"B": 2}}}), "vae_repa.block lacks `other`"),
        (first(cell={"of": "vae_repa", "with": {"vae_repa.block": {"Q": 2, "other": 1}}}), "has the size 'Q'"),
        (lambda whole: whole["settings"]["repa"].update(sra={}), "settings repa: the key 'sra' is not known"),
        (
            lambda whole: whole["claims"].append(whole["claims"][0]),
            "the id vae-repa-better-than-vanilla is given twice",
        ),
        (lambda whole: whole["claims"][1].update(metric="gflops"), f"takes {' or '.join(COUNTS)}"),
        (
            lambda whole: whole["claims"][1].update(metric="external_parameters"),
            "against is given: external_parameters",
        ),
        (lambda whole: whole["claims"][2].update(value=0.5), "value is 0.5: give the factor of the speed-up"),
    ],
)
def test_a_wrong_ledger_is_refused(
    edited: Callable[..., Path], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_ledger(edited(change))


def test_the_same_ledger_unchanged_is_read(edited: Callable[..., Path]) -> None:
    assert [claim.kind for claim in load_ledger(edited(lambda whole: None)).claims] == ["quality", "count", "speed-up"]


def test_what_is_no_yaml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text("claims: [")
    with pytest.raises(UserError, match="cannot be read as YAML"):
        load_ledger(tmp_path / "claims.yaml")
    (tmp_path / "claims.yaml").write_text("- 1")
    with pytest.raises(UserError, match="is no mapping"):
        load_ledger(tmp_path / "claims.yaml")
