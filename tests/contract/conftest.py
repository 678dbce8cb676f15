"""What the rule book is held against: every discovered method, and a sum of two."""

import pytest

import methods

CONTROL = methods.control()
SUM = "repa+vae_repa"
METHODS = [*methods.names(), SUM]
"""Every method there is, and a sum: a new file in methods/ is held to the rule book the moment it exists."""


@pytest.fixture(params=METHODS)
def method_name(request: pytest.FixtureRequest) -> str:
    return request.param
