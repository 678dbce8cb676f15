"""Programs that tests run and that are not installed with the package."""

import shutil

import pytest


def needed(package: str, *names: str) -> str:
    """The path of the first of these programs that is there; the test fails, naming the package, where none is."""
    found = next((path for name in names if (path := shutil.which(name))), "")
    if not found:
        pytest.fail(f"{names[0]} is missing: install it (Debian: apt-get install {package}), then test again")
    return found
