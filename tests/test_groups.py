"""Tests of one xdist group share what they have set up: a pytest that ignores the groups would set it up in every process."""

import pytest


@pytest.mark.xdist_group("groups")
def test_groups_are_heeded(request: pytest.FixtureRequest) -> None:
    if not getattr(request.config.option, "loadgroup", False):  # what pytest-xdist tells its workers
        pytest.skip("only with --dist loadgroup")
    assert request.node.nodeid.endswith("@groups"), "this pytest and this pytest-xdist do not work together"
