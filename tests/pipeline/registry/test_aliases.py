"""Which version carries which alias after which event."""

import pytest

from pipeline.core.errors import ModelError
from pipeline.registry.aliases import after_keeping_out, after_promotion, after_rollback


def after(aliases: dict[str, str], moves: dict[str, str | None]) -> dict[str, str]:
    return {alias: version for alias, version in {**aliases, **moves}.items() if version is not None}


@pytest.mark.parametrize(
    ("aliases", "version", "then"),
    [
        ({}, "1", {"challenger": "1"}),
        ({"champion": "1"}, "2", {"champion": "1", "challenger": "2"}),
        ({"champion": "1", "challenger": "9"}, "10", {"champion": "1", "challenger": "10"}),
        ({"champion": "1", "challenger": "10"}, "9", {"champion": "1", "challenger": "10"}),
        ({"champion": "2"}, "2", {"champion": "2"}),
        ({"champion": "3", "previous": "2"}, "2", {"champion": "3", "previous": "2"}),
    ],
)
def test_kept_out(aliases, version, then) -> None:
    assert after(aliases, after_keeping_out(aliases, version)) == then


@pytest.mark.parametrize(
    ("aliases", "version", "then"),
    [
        ({}, "1", {"champion": "1"}),
        ({"champion": "1"}, "2", {"champion": "2", "previous": "1"}),
        ({"champion": "2", "previous": "1"}, "3", {"champion": "3", "previous": "2"}),
        ({"champion": "1", "challenger": "2"}, "2", {"champion": "2", "previous": "1"}),
        ({"champion": "1", "challenger": "2"}, "3", {"champion": "3", "previous": "1", "challenger": "2"}),
        ({"champion": "2", "previous": "1"}, "1", {"champion": "1", "previous": "2"}),
        ({"champion": "2", "previous": "1"}, "2", {"champion": "2", "previous": "1"}),
        ({"previous": "1"}, "2", {"champion": "2", "previous": "1"}),
        ({"previous": "1"}, "1", {"champion": "1"}),
    ],
)
def test_promoted(aliases, version, then) -> None:
    assert after(aliases, after_promotion(aliases, version)) == then


def test_the_champion_is_written_after_the_previous_one() -> None:
    """Whoever dies in between leaves a champion, and it is the old one."""
    assert list(after_promotion({"champion": "1", "challenger": "2"}, "2")) == ["previous", "champion", "challenger"]
    assert list(after_rollback({"champion": "2", "previous": "1"}, "m")) == ["previous", "champion"]


def test_rolled_back_and_forward_again() -> None:
    two = {"champion": "2", "previous": "1", "challenger": "3"}
    back = after(two, after_rollback(two, "m"))
    assert back == {"champion": "1", "previous": "2", "challenger": "3"}
    assert after(back, after_rollback(back, "m")) == two


@pytest.mark.parametrize(
    ("aliases", "says"),
    [
        ({}, "m has no previous champion to go back to: it never had a champion"),
        ({"champion": "4"}, "version 4 is its first champion"),
        ({"champion": "4", "previous": "4"}, "no previous champion"),
    ],
)
def test_nothing_to_go_back_to(aliases, says) -> None:
    with pytest.raises(ModelError, match=says):
        after_rollback(aliases, "m")
