"""Any mutated config either trains two steps or is refused in one clear line that names what was wrong.

Keys come from the config's dataclasses and from every method's own section, so a new field or method is fuzzed without
an edit here. Values are of the right type at and beyond the edges, or of a wrong type; the file itself is damaged too.
Sizes stay small where a valid value would only cost time; what exceeds memory is refused by the estimate.
"""

import _thread
import contextlib
import dataclasses
import io
import os
import re
import tempfile
import threading
import types
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import methods
from harness.config import RunConfig
from harness.machine import ram
from harness.records.files import read_json
from studies import cli
from studies.configs.sections import SECTIONS

FULL = os.environ.get("DITBENCH_FULL") == "1"
CASES = 500 if FULL else 12
SECONDS = 60
"""A case that takes longer hangs."""
MEMORY = 3 * 2**30
"""Bytes of RAM that the estimate is told: the outcome must not depend on the machine."""

BASE: dict[str, Any] = {
    "study": "fuzz",
    "model": {"name": "SiT-pico/2"},
    "data": {"name": "digits", "image_size": 32, "holdout": 0.95},
    "optimizer": {"batch_size": 8},
    "budget": {"amount": 2},
    "evaluation": {
        "points": 1,
        "num_samples": 12,
        "kid_subset": 8,
        "velocity_images": 8,
        "grid_images": 4,
        "extractor_size": 32,
        "sampler": {"num_steps": 2},
    },
    "runtime": {"device": "cpu", "precision": "fp32"},
    "output": {"mlflow": False},
    "repa": {"encoders": "efficientnet_lite2"},
    "irepa": {"encoders": "efficientnet_lite2"},
}
"""Two steps of the smallest model, evaluated once, on 90 training images."""


# -- what may be changed, and into what -----------------------------------------------------------------------------


def keys_of(cls: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type of every field of a config section, those of sections inside it included."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        inner = dataclasses.is_dataclass(hint) and isinstance(hint, type)
        found |= keys_of(hint, f"{prefix}{name}.") if inner else {f"{prefix}{name}": hint}
    return found


KEYS = {key: hint for key, hint in keys_of(RunConfig).items() if key != "sections"} | {
    key: hint for name in methods.names() for key, hint in keys_of(methods.load(name).Config, f"{name}.").items()
}
WHOLE = (*SECTIONS, *methods.names(), "evaluation.sampler")
"""Sections, which are mappings and no values."""
STRANGE_KEYS = (
    "optimiser.lr",
    "optimizer.lrr",
    "model",
    "evaluation.sampler.kinds",
    "data.image size",
    "ключ",
    "a.b.c",
)

HUGE = [2**31, 2**32 + 1, 2**62, 2**63 - 1, 2**63, 10**30, 10**400, -1, -(2**31), -(2**63) - 1, -(10**30)]
"""Whole numbers at and beyond what a machine counts with."""
INTS = st.one_of(st.integers(0, 20), st.sampled_from([0, 1, 2, 3, 4, 32, 64]), st.integers(0, 4), st.sampled_from(HUGE))
FLOATS = st.one_of(
    st.floats(0, 1, width=16),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e-30, 1e-3, 0.1, 1 - 1e-16, 1.0, 1.5, 30.0, 1e30, 1e38, 1e308]),
    st.sampled_from([-1e-9, -1.0, -1e308, float("inf"), -float("inf"), float("nan")]),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", " ", ".", "..", "nowhere", "a/b", "../up", "~", "-", "--", "-1", "null", "yes", "1e5", "nan", "0x10",
         "[bold]", "[/bold]", "${HOME}", "$(x)", "%s", "{0}", "ünïcødé ✓", "שלום", "🙂", "a,b", "a,,b", "sit+sra",
         "<script>", "a\tb", "a\nb", "a\x00b", "a\x1bb", "x" * 300, "é" * 300, "x" * 5000]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="/\\"), max_size=8),
)  # fmt: skip
DEEP: Any = "end"
for _ in range(60):
    DEEP = [DEEP]
WRONG = st.one_of(
    st.none(),
    st.booleans(),
    INTS,
    FLOATS,
    TEXTS,
    st.sampled_from([[], [1, 2], {}, {"a": 1}, {1: 2}, [[]], {"a": {"b": []}}, DEEP, ["x"] * 2000, b"\x00\xff"]),
    st.dates(),
)
"""Values of any type; mostly the wrong one for a key."""

CAPPED = {
    # What a valid value of these costs is time, or a machine's own devices: valid ones are small here.
    "budget.amount": st.sampled_from([1, 2, 3, 2.0, 0.5, 1e-9, 0, -1, 1e16, 1e30, float("nan"), *HUGE[3:]]),
    "data.holdout": st.sampled_from([0.0, 0.95, 0.96, 0.99, 0.9999, 1.0, -0.5, 1e-9, 5e-324, float("nan"), 1e308]),
    "data.image_size": st.sampled_from([7, 8, 12, 16, 30, 32, 36, 40, 1600, 2048, 2049, *HUGE]),
    "data.path": st.one_of(st.none(), TEXTS.filter(lambda text: not text.startswith(("/", "~", ".")))),
    "evaluation.chunk": st.one_of(st.integers(-1, 20), st.sampled_from(HUGE)),
    "evaluation.extractor_size": st.sampled_from([0, 1, 2, 7, 8, 31, 32, 64, 65, *HUGE]),
    "evaluation.reference": TEXTS.filter(lambda text: not text.startswith(("/", "~", "."))),
    "evaluation.points": st.sampled_from([0, 1, 2, 3, 5, 10_001, *HUGE]),
    "evaluation.sampler.num_steps": st.sampled_from([0, 1, 2, 3, 5, *HUGE]),
    "model.name": st.sampled_from(
        ["SiT-pico/1", "SiT-pico/2", "SiT-pico/4", "SiT-pico/8", "SiT-nano/2", "SiT-nano/4", "SiT-pico/3",
         "SiT-pico/0", "SiT-pico/-1", "SiT-pico/16", f"SiT-pico/{10**30}", "SiT-pico/٢", "SiT-pico/2\n", "SiT-huge/2",
         "SiT-XL/2", "SiT-pico", "pico/2", "sit-pico/2", "SiT-pico/2/2", "", "x" * 5000]
    ),
    "output.mlflow_uri": st.sampled_from(["", "nowhere", "sqlite:///", "sqlite:///a/b.db", "ftp://x", "é", "x" * 300]),
    "runtime.compile": st.sampled_from([False]),
    "runtime.device": st.sampled_from(["cpu", "cpu:1", "tpu", "meta", "", "cuda:99", "CPU", "cpu:x", "x" * 5000]),
    "runtime.threads": st.sampled_from([0, 1, 2, 2000, *HUGE]),
}  # fmt: skip
NAMES = {
    "method": st.sampled_from(
        [*methods.names(), "+".join(methods.names()), "sit+sit", "sit+", "+", "", "sit + sra", "sitt", "_parts", "a,b"]
    ),
    "repa.encoders": st.sampled_from(
        ["efficientnet_lite2", "efficientnet_lite2,efficientnet_lite0", "dinov2_vitb14", "inception", "a", ",", ""]
    ),
    "evaluation.extractor": st.sampled_from(
        ["efficientnet_lite0", "efficientnet_lite2", "inception", "dinov2_vits14", ""]
    ),
}  # fmt: skip
"""Texts that mean something; other texts are given to these keys too."""


def typed(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, in and out of its range."""
    if typing.get_origin(hint) is typing.Literal:
        return st.sampled_from(typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return st.one_of([typed(part) for part in typing.get_args(hint)])
    known = {int: INTS, float: FLOATS, bool: st.booleans(), str: TEXTS}
    return known.get(hint, WRONG)


@st.composite
def values_of(draw: st.DrawFn, key: str) -> Any:
    """Mostly a value of the key's type, one of twelve of any type. What costs time alone is never drawn from there."""
    if draw(st.integers(0, 11)):
        right = CAPPED[key] if key in CAPPED else typed(KEYS[key])
        return draw(NAMES[key] if key in NAMES and draw(st.booleans()) else right)
    if key in CAPPED:
        return draw(WRONG.filter(lambda value: not isinstance(value, (int, float, str))))
    return draw(WRONG)


@dataclass(frozen=True)
class Case:
    """A mutated config: what is written to the file, and what follows on the command line."""

    in_file: Mapping[str, Any]
    on_line: Mapping[str, Any]
    method: str = "sit"
    """Of the base config: mostly the one whose settings are changed."""
    text: str = ""
    """Put at the end of the file as it is."""
    whole: bool = True
    """Whether the file holds the base config as well."""

    @property
    def changed(self) -> list[str]:
        return [*self.in_file, *self.on_line]


TAILS = (
    *("optimizer: {lr: 1.0e-3}", "optimizer: {lr: 1.0e-3, lr: 2.0e-3}", "seed: 1\nseed: 2"),
    *("cell: *nowhere", "cell: !!python/object/apply:os.getcwd []"),
    *("%YAML 9.9", "---", "---\n---", "\tseed: 1", "seed: 1: 2", "cell: 'a", "- 1", "seed", "\x00", "\ufeffseed: 1"),
    *("? [a]\n: 1", "<<: {seed: 3}", "cell: !!binary x"),
)  # fmt: skip
"""Ends of a file: given twice, aliases, tags, and what is no YAML at all."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One to four keys changed, in the file or on the command line, and now and then a damaged file."""
    keys = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=4, unique=True))
    changes = {key: draw(values_of(key)) for key in keys}
    if draw(st.integers(0, 15)) == 0:
        changes = {draw(st.sampled_from(WHOLE)): draw(WRONG)}
    if draw(st.integers(0, 15)) == 0:
        changes |= {draw(st.sampled_from(STRANGE_KEYS)): draw(WRONG)}
    on_line = {key: value for key, value in changes.items() if draw(st.booleans())}
    text = draw(st.sampled_from(TAILS)) if draw(st.integers(0, 15)) == 0 else ""
    in_file = {key: value for key, value in changes.items() if key not in on_line}
    used = [name for name in methods.names() if any(key.startswith(f"{name}.") for key in changes)]
    method = "+".join(used) if used and draw(st.integers(0, 3)) else "sit"
    return Case(in_file, on_line, method, text, whole=not text or draw(st.booleans()))


# -- one case -------------------------------------------------------------------------------------------------------


def nested(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base config with dotted keys set."""
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        place = config
        *sections, last = key.split(".")
        for section in sections:
            inner = place.get(section)
            place[section] = dict(inner) if isinstance(inner, dict) else {}
            place = place[section]
        place[last] = value
    return config


def words_of(case: Case, folder: Path, cache: Path) -> list[str]:
    """Write the case's file, and give the words of its command."""
    plain = yaml.safe_dump(
        nested({**BASE, "method": case.method} if case.whole else {}, case.in_file), allow_unicode=True
    )
    (folder / "config.yaml").write_text(f"{plain if case.whole or case.in_file else ''}{case.text}\n", encoding="utf-8")
    words = ["train", "--output.cache", str(cache), "--config", "config.yaml"]
    if "output.cache" in case.changed or "output" in case.changed:
        words = ["train", "--config", "config.yaml"]
    for key, value in case.on_line.items():
        words += [f"--{key}", word_of(value)]
    return words


def word_of(value: Any) -> str:
    """A value as it is written on the command line, where no word holds a zero byte."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.removesuffix("\n...\n").removesuffix("\n").replace("\x00", "0")


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    err: str
    warned: list[str]
    left: list[str]
    """Files and empty folders that it left behind, the config and caches apart."""
    ends: list[str]
    """Status of every run that it recorded."""


def run(case: Case, cache: Path) -> Outcome:
    """`ditbench train` on a case, in this process and in a folder of its own; paths may lead to the one above."""
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("default")
        above, here, err = Path(name), Path(name) / "here", io.StringIO()
        here.mkdir()
        words = words_of(case, here, cache)
        with (
            contextlib.chdir(here),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(err),
            in_time(),
        ):
            status = cli.main(words)
        paths = [path for path in above.rglob("*") if path.is_file() or not any(path.iterdir())]
        made = [path for path in paths if path.name != "config.yaml" and not any(map(is_cache, path.parts))]
        return Outcome(
            status=status,
            err=err.getvalue(),
            warned=[str(warning.message) for warning in warned],
            left=[str(path.relative_to(above)) for path in made],
            ends=[read_json(path)["status"] for path in made if path.name == "manifest.json"],
        )


def is_cache(name: str) -> bool:
    """Whether a file or folder of this name is part of a cache."""
    return name.startswith(("moments-", "tokens-", "images-", "files-", "floor-", "features"))


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Interrupt what takes longer than `SECONDS`, as a hang would."""
    timer = threading.Timer(SECONDS, _thread.interrupt_main)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def problem(case: Case, outcome: Outcome) -> str:
    """What is wrong with how a case ended; empty when nothing is."""
    if outcome.warned:
        return f"warnings: {outcome.warned}"
    if outcome.status == 0:
        good = not outcome.err and len(outcome.ends) == 1 and outcome.ends[0] in ("finished", "diverged")
        return "" if good else f"ended 0 with {outcome.ends} and {outcome.err!r}"
    if outcome.status != 2:
        return f"ended {outcome.status}: {outcome.err!r}"
    if not re.fullmatch(r"ditbench: [^\n]+\n", outcome.err) or len(outcome.err) >= 500 or "Traceback" in outcome.err:
        return f"not one short line ({len(outcome.err)} characters): {outcome.err[:600]!r}"
    if outcome.left:
        return f"left behind {outcome.left} after {outcome.err!r}"
    if case.whole and not any(name in outcome.err for name in names_in(case)):
        return f"{case.changed} not named in {outcome.err!r}"
    return ""


def names_in(case: Case) -> list[str]:
    """What a refusal may name: a changed key, its section, the text that it was given, or the damaged file."""
    keys = [part for key in case.changed for part in (key, key.split(".")[0], key.rpartition(".")[2])]
    texts = [value for value in case.in_file.values() if isinstance(value, str)]
    texts += [word_of(value) for value in case.on_line.values()]
    given = [text[:100] if len(text) > 5 else repr(text) for text in texts]
    return [*keys, *given, *(["--config"] if case.text else [])]


@pytest.fixture(scope="module")
def cache(shared_cache: Path) -> Iterator[Path]:
    """One cache for all cases, and this process's threads as they were."""
    threads = torch.get_num_threads()
    yield shared_cache
    torch.set_num_threads(threads)


def test_capped_keys_exist() -> None:
    assert not {*CAPPED, *NAMES} - set(KEYS), "a key was renamed: its values are no longer capped"


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_any_config_trains_or_is_refused_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ram.free_ram()
    monkeypatch.setattr(ram, "free_ram", lambda: min(real, MEMORY))

    @settings(
        max_examples=CASES,
        derandomize=not FULL,
        database=None,
        deadline=None,
        print_blob=FULL,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases())
    def check(case: Case) -> None:
        found = problem(case, run(case, cache))
        assert not found, f"{case}: {found}"

    check()
