"""The arrows between the folders, and rules that a reader of one file cannot check (architecture.md, style.md 2).

Each rule is a function from source text to the lines that break it, tried on small sources first.
"""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import methods

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "harness": ("harness",),
    "methods": ("harness", "methods"),
    "studies": ("harness", "methods", "reports", "studies"),
    "reports": ("harness.records", "reports"),
    "tests": ("harness", "methods", "reports", "studies", "tests"),
}
"""What a folder may import of ours."""
ROOMS = {
    "harness": (
        *(
            "training",
            "analysis",
            "cost",
            "evaluation",
            "data",
            "frozen",
            "tracking",
            "backbones",
            "machine",
            "records",
        ),
    ),
    "studies": (
        "cli",
        "commands",
        "ablation",
        "dispatch",
        "costs",
        "runs",
        "configs",
        "children",
        "terminal",
        "agenda",
    ),
    "reports": (
        *("report", "joint", "references", "final", "claims", "ablation", "analysis", "result", "costs", "setup"),
        *("page", "published", "figures", "tables", "statistics", "study"),
    ),
}
"""Folders and front files of a package from the top; an import leads downward. The other files of `harness/` are the
contract that every room may import, as is `reports/sections.py`."""
FREE_OF_ROOMS = ("config", "errors", "rng")
"""Front files of `harness/` that everything builds on: of the rooms they import the backbones and the records alone."""


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"no source under {folders}"
    return found


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every dotted name that is imported, wherever in the file, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node.lineno) for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def crossed_arrows(source: str, folder: str) -> list[str]:
    """Imports that `folder` may not make; relative ones are refused, as they hide where they lead."""
    return [
        f"line {line}: {name}"
        for name, line in imports(ast.parse(source))
        if name.startswith(".")
        or (
            any(is_inside(name, ours) for ours in MAY_IMPORT)
            and not any(is_inside(name, allowed) for allowed in MAY_IMPORT[folder])
        )
    ]


def full_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: `np` -> numpy, `randn` -> torch.randn."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return known


def dotted(node: ast.expr) -> str:
    """`torch.random.seed` of an attribute chain, or "" where it hangs on something else than a name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (front := dotted(node.value)):
        return f"{front}.{node.attr}"
    return ""


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the full name of what is called, import aliases resolved."""
    known = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := dotted(node.func)):
            first, _, rest = name.partition(".")
            yield ".".join(filter(None, (known.get(first, first), rest))), node


def prints(source: str) -> list[str]:
    return [f"line {call.lineno}: print" for name, call in calls(ast.parse(source)) if name == "print"]


GLOBAL_DRAWS = re.compile(
    r"torch\.(random\.)?(manual_seed|seed|initial_seed|set_rng_state)|torch\.(cuda|mps|xpu)\.(manual_seed|seed)(_all)?"
    r"|numpy\.random\.(?!SeedSequence$|Generator$|RandomState$|PCG64$|Philox$|default_rng$)\w+|random\.(?!Random$)\w+"
    r"|(transformers|accelerate\.utils)\.set_seed|lightning\.seed_everything"
)
"""Functions that read or move a global random state whatever they are given."""
DRAWS = re.compile(
    r"torch\.(rand|randn|randint|randperm|normal|bernoulli|multinomial|poisson|rand_like|randn_like|randint_like)"
    r"|torch\.nn\.init\.(?!zeros_|ones_|constant_|eye_|dirac_|calculate_gain)\w+"
)
"""Functions that draw from the global state unless they are given a generator."""


def global_draws(source: str) -> list[str]:
    """Uses of a global random state; seeding it is allowed in `with global_state_kept():`, which restores it."""
    tree = ast.parse(source)
    kept = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("global_state_kept" in ast.unparse(item) for item in node.items)
    ]
    restored = {id(inner) for block in kept for inner in ast.walk(block)}
    found = []
    for name, call in calls(tree):
        touches = GLOBAL_DRAWS.fullmatch(name) and id(call) not in restored
        undirected = DRAWS.fullmatch(name) and not any(keyword.arg == "generator" for keyword in call.keywords)
        unseeded = (
            name in ("numpy.random.default_rng", "numpy.random.RandomState") and not call.args and not call.keywords
        )
        if touches or undirected or unseeded:
            found.append(f"line {call.lineno}: {name}")
    return found


def method_branches(source: str, names: set[str]) -> list[str]:
    """Method names written out in a comparison, a condition or a match."""
    conditions: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            conditions.append(node)
        elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
            conditions.append(node.test)
        elif isinstance(node, ast.match_case):
            conditions.append(node.pattern)
    literals = [n for condition in conditions for n in ast.walk(condition) if isinstance(n, ast.Constant)]
    return sorted({f"line {n.lineno}: {n.value}" for n in literals if isinstance(n.value, str) and n.value in names})


# -- the rules find what they are for -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "source", "refused"),
    [
        ("harness", "import methods", ["line 1: methods"]),
        ("harness", "def f():\n    from methods.sit import Sit", ["line 2: methods.sit.Sit"]),
        ("harness", "from . import flow", ["line 1: ..flow"]),
        ("harness", "from harness import flow\nimport torch", []),
        ("methods", "from studies import cli", ["line 1: studies.cli"]),
        ("methods", "from methods._parts import mlp\nfrom harness.method import Method", []),
        ("reports", "from harness import records", []),
        ("reports", "from harness.records.metrics import metric\nfrom reports import tables", []),
        ("reports", "from harness import records, config", ["line 1: harness.config"]),
        ("reports", "import harness", ["line 1: harness"]),
        ("reports", "from harness.records_of_others import x", ["line 1: harness.records_of_others.x"]),
        ("studies", "import tests.conftest", ["line 1: tests.conftest"]),
        ("studies", "import methodology", []),
    ],
)
def test_arrows_are_checked(folder: str, source: str, refused: list[str]) -> None:
    assert crossed_arrows(source, folder) == refused


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("import torch\ntorch.manual_seed(0)", "torch.manual_seed"),
        ("from torch import manual_seed as m\nm(0)", "torch.manual_seed"),
        ("import torch.cuda\ntorch.cuda.manual_seed_all(0)", "torch.cuda.manual_seed_all"),
        ("import numpy as np\nnp.random.seed(0)", "numpy.random.seed"),
        ("import numpy as np\nnp.random.randn(3)", "numpy.random.randn"),
        ("import numpy as np\nnp.random.default_rng()", "numpy.random.default_rng"),
        ("import numpy as np\nnp.random.RandomState()", "numpy.random.RandomState"),
        ("import random\nrandom.shuffle([])", "random.shuffle"),
        ("from random import random\nrandom()", "random.random"),
        ("import torch\nx = torch.randn(3)", "torch.randn"),
        ("from torch import nn\nnn.init.xavier_uniform_(w)", "torch.nn.init.xavier_uniform_"),
        ("import numpy as np\nnp.random.default_rng(0)\nnp.random.RandomState(0)\nnp.random.SeedSequence([1])", None),
        ("import torch\ntorch.randn(3, generator=g)\ng.manual_seed(0)\ntorch.Generator('cpu')", None),
        ("import random\nrandom.Random(0)", None),
        ("from torch import nn\nnn.init.zeros_(w)\nnn.init.normal_(w, generator=g)", None),
        ("import torch\nwith rng.global_state_kept():\n    torch.manual_seed(0)", None),
        ("import torch\nwith rng.global_state_kept():\n    pass\ntorch.manual_seed(0)", "torch.manual_seed"),
        ("import torch\nwith rng.global_state_kept():\n    x = torch.rand(3)", "torch.rand"),
    ],
)
def test_global_draws_are_found(source: str, refused: str | None) -> None:
    line = len(source.splitlines())
    assert global_draws(source) == ([f"line {line}: {refused}"] if refused else [])


@pytest.mark.parametrize(
    ("source", "num"),
    [
        ("if method == 'repa': pass", 1),
        ("x = 1 if name in ('repa', 'sra') else 2", 2),
        ("ok = 'sit' != name", 1),
        ("if sections.get('repa'): pass", 1),
        ("match name:\n    case 'sra': pass", 1),
        ("method = 'sit'\nif method in names(): pass", 0),
        ("if method == 'repa_like': pass", 0),
    ],
)
def test_method_names_in_conditions_are_found(source: str, num: int) -> None:
    assert len(method_branches(source, {"repa", "sra", "sit"})) == num


def test_prints_are_found() -> None:
    assert prints("def f():\n    print('x')\n    table.print()") == ["line 2: print"]


# -- and the tree keeps them ----------------------------------------------------------------------------------------


def offences(rule: Callable[[str], list[str]], *folders: str) -> list[str]:
    return [f"{path.relative_to(ROOT)}, {hit}" for path in sources(*folders) for hit in rule(path.read_text())]


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_import_only_what_they_may(folder: str) -> None:
    assert offences(lambda source: crossed_arrows(source, folder), folder) == []


def test_nothing_in_harness_or_methods_prints() -> None:
    assert offences(prints, "harness", "methods") == []


def test_nothing_in_harness_or_methods_uses_a_global_random_state() -> None:
    assert offences(global_draws, "harness", "methods") == []


def test_no_method_is_named_in_a_condition_outside_its_folder() -> None:
    names = set(methods.names())
    assert {"repa", "sit"} <= names
    assert offences(lambda source: method_branches(source, names), "harness", "studies", "reports") == []


def loaded_by(modules: Sequence[str], *heavy: str) -> dict[str, list[str]]:
    """What of `heavy` each of the modules loads, those before it in the list loaded already, in a fresh process."""
    code = (
        f"import importlib, json, sys\nfound, heavy = {{}}, set({heavy!r})\n"
        f"for module in {list(modules)!r}:\n"
        "    before = heavy & sys.modules.keys()\n    importlib.import_module(module)\n"
        "    found[module] = sorted((heavy & sys.modules.keys()) - before)\n"
        "print(json.dumps(found))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_reports_load_without_torch() -> None:
    modules = [module_name(path) for path in sources("reports")]
    assert "reports.page.render" in modules
    # Optuna comes last: it is imported when its figures are drawn.
    found = loaded_by(
        [*modules, "optuna.importance", "optuna.visualization.matplotlib"],
        *("torch", "methods", "studies", "harness.config", "harness.method"),
    )
    assert {module: names for module, names in found.items() if names} == {}
    pyplot = loaded_by(modules, "matplotlib.pyplot")
    assert pyplot["reports.page.render"] == [], "pyplot picks a backend when it is imported"


def arrows(package: str, sources: dict[str, str]) -> dict[str, set[str]]:
    """For each room of a package the other rooms of it that its files import.

    Args:
        package: such as `harness`.
        sources: the text of each file, by its path from the package's folder, such as `data/cache.py`.
    """
    rooms = {path.split("/")[0].removesuffix(".py") for path in sources}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for path, source in sources.items():
        room = path.split("/")[0].removesuffix(".py")
        for name, _ in imports(ast.parse(source)):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in rooms - {room}:
                found[room].add(parts[1])
    return found


def upward(found: dict[str, set[str]], order: Sequence[str]) -> list[str]:
    """Imports that lead to a room further up in `order`; rooms that are not in it are passed over."""
    place = {room: number for number, room in enumerate(order)}
    return sorted(
        f"{room} -> {other}"
        for room, others in found.items()
        for other in others
        if room in place and other in place and place[other] < place[room]
    )


def sources_of(package: str) -> dict[str, str]:
    folder = ROOT / package
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sources(package)}


def test_arrows_between_rooms_are_found() -> None:
    files = {
        "data/cache.py": "from harness.records.files import digest\nfrom harness import config",
        "records/files.py": "def f():\n    import harness.data.cache",
        "config.py": "import torch",
    }
    found = arrows("harness", files)
    assert found == {"data": {"records", "config"}, "records": {"data"}, "config": set()}
    assert upward(found, ["data", "records"]) == ["records -> data"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(found).prepare()


@pytest.mark.parametrize("package", ROOMS)
def test_imports_lead_downward(package: str) -> None:
    found = arrows(package, sources_of(package))
    folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(ROOMS[package]) <= set(found), "every room has its place, and every place is a room"
    assert upward(found, ROOMS[package]) == []


@pytest.mark.parametrize("package", ["harness", "studies", "reports"])
def test_rooms_form_no_circle(package: str) -> None:
    folders = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").is_file()}
    found = {room: others & folders for room, others in arrows(package, sources_of(package)).items() if room in folders}
    assert any(found.values())
    graphlib.TopologicalSorter(found).prepare()  # raises CycleError where they do


def test_what_everything_builds_on_imports_no_room() -> None:
    found, rooms = arrows("harness", sources_of("harness")), set(ROOMS["harness"])
    assert {room: found[room] & rooms - {"backbones", "records"} for room in FREE_OF_ROOMS} == {
        room: set() for room in FREE_OF_ROOMS
    }


def test_unit_tests_lie_where_their_modules_do() -> None:
    """Each folder of tests/unit has a folder of the same path among the packages."""
    unit = ROOT / "tests" / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    assert {Path("harness/data"), Path("studies/runs"), Path("reports/page")} <= folders
    stray = {str(folder) for folder in folders if not ((ROOT / folder).is_dir() or (ROOT / "tests" / folder).is_dir())}
    assert stray == set()


def test_config_and_records_are_free_of_torch_and_pandas() -> None:
    modules = [*map(module_name, sources("harness/records")), "harness.config", "harness.errors"]
    assert loaded_by(modules, "torch", "pandas") == {module: [] for module in modules}


def test_loaded_modules_are_seen() -> None:
    assert loaded_by(["harness.records.run_folder", "harness.rng"], "torch") == {
        "harness.records.run_folder": [],
        "harness.rng": ["torch"],
    }
