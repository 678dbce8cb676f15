"""`sample --npz` and `evaluate --samples`, on the finished study."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from studies import saved
from tests.e2e.conftest import FinishedStudy

Ditbench = Callable[..., tuple[int, str, str]]
SMALL_CHUNKS = ("--num", "48", "--evaluation.chunk", "20")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


def test_an_interrupted_command_goes_on_to_the_same_file(
    finished: FinishedStudy, ditbench: Ditbench, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole, out = str(finished.run("sit")), folder / "whole.npz", folder / "out.npz"
    status, printed, err = ditbench("sample", run, *SMALL_CHUNKS, "--npz", str(whole))
    assert (status, err) == (0, "")
    assert printed.splitlines()[-1] == f"48 images of step 6 in {whole}"
    loaded = np.load(whole)
    assert loaded["arr_0"].shape == (48, 32, 32, 3)
    assert loaded["arr_1"].tolist() == [i % 10 for i in range(48)]

    generate, starts = saved.generate_rounds, []

    def interrupted(*arguments: Any) -> Any:
        for part in generate(*arguments):
            starts.append(part.start)
            if part.start == 20:
                raise KeyboardInterrupt
            yield part

    with monkeypatch.context() as patched:
        patched.setattr(saved, "generate_rounds", interrupted)
        assert ditbench("sample", run, *SMALL_CHUNKS, "--npz", str(out))[0] == 130
    assert starts == [0, 20]
    assert not out.exists()
    status, printed, err = ditbench("sample", run, *SMALL_CHUNKS, "--npz", str(out))
    assert (status, err) == (0, "")
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == ["out.npz", "whole.npz"]
