"""The registry and the commands on it, on a real MLflow database: aliases, their history, and deaths in between."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import ModelError
from pipeline.registry.aliases import change_aliases, event, finish_interrupted_change, history
from pipeline.registry.store import ModelVersion, Registry
from pipeline.run.stages.register import _check_champion, _set_aliases
from tests.pipeline.registry.conftest import Kasa

NAME = "reviews"
GATE = {
    "metric": "accuracy", "margin": 0.0, "guards": {},
    "against": {"base": {"accuracy": {"estimate": 0.25, "low": 0.2, "high": 0.3}}},
}  # fmt: skip


def add(registry: Registry, promote: bool, name: str = NAME) -> ModelVersion:
    """What stands in the registry when a version has been made and its aliases have not."""
    if registry.registered_model(name) is None:
        registry.client.create_registered_model(name)
    tags = {
        "kasa.decision": "promoted" if promote else "kept out",
        "kasa.reason": "because",
        "kasa.judged_against": registry.aliases(name).get("champion", ""),
        "kasa.gate": json.dumps(GATE),
        "kasa.accuracy": "0.9",
        "kasa.data_digest": "abcdef" * 8,
    }
    number = registry.client.create_model_version(name, source=str(Path.cwd()), tags=tags).version
    version = registry.version(name, str(number))
    assert version is not None
    return version


def register(registry: Registry, *promoted: bool) -> None:
    for promote in promoted:
        _set_aliases(registry, add(registry, promote))


def whats(registry: Registry, number: str) -> list[str]:
    version = registry.version(NAME, number)
    assert version is not None
    return [one["what"] for one in history(version)]


def test_the_gates_verdicts_move_aliases(registry: Registry) -> None:
    register(registry, False)
    assert registry.aliases(NAME) == {"challenger": "1"}
    register(registry, True)
    assert registry.aliases(NAME) == {"challenger": "1", "champion": "2"}
    register(registry, True, False)
    assert registry.aliases(NAME) == {"challenger": "4", "champion": "3", "previous": "2"}
    assert whats(registry, "2") == ["promoted", "replaced"]
    version = registry.version(NAME, "3")
    assert version is not None
    assert "promoted by gate: because" in version.description


@pytest.mark.parametrize("writes", range(7))
def test_a_death_between_two_writes_leaves_a_champion_and_is_made_good(registry: Registry, writes: int) -> None:
    register(registry, True, True, False)
    before = {"champion": "2", "previous": "1", "challenger": "3"}
    assert registry.aliases(NAME) == before
    happened = [event("3", "promoted by hand", "me", "a reason"), event("2", "replaced", "me", "a reason")]
    names = (
        "set_registered_model_alias",
        "delete_registered_model_alias",
        "set_model_version_tag",
        "update_model_version",
    )
    calls = 0

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            if calls == writes:
                raise KeyboardInterrupt
            calls += 1
            return real(*arguments, **named)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in names:
            patched.setattr(registry.client, name, dying(getattr(registry.client, name)))
        with pytest.raises(KeyboardInterrupt):
            change_aliases(registry, NAME, {"previous": "2", "champion": "3", "challenger": None}, happened)
    assert registry.aliases(NAME)["champion"] == ("2" if writes < 2 else "3")
    finish_interrupted_change(registry, NAME)
    assert registry.aliases(NAME) == {"champion": "3", "previous": "2"}
    assert whats(registry, "3") == ["kept out", "promoted by hand"]
    version = registry.version(NAME, "3")
    assert version is not None
    assert version.description.count("a reason") == 1
    registry.client.set_registered_model_alias(NAME, "champion", "1")
    finish_interrupted_change(registry, NAME)  # crossed out: nothing is done twice
    assert registry.aliases(NAME)["champion"] == "1"


def test_a_run_that_died_before_the_aliases_goes_on_only_if_the_champion_is_the_same(registry: Registry) -> None:
    register(registry, True, True)
    late = add(registry, True)
    registry.client.set_registered_model_alias(NAME, "champion", "1")
    _set_aliases(registry, late)
    assert registry.aliases(NAME)["champion"] == "1"
    assert registry.aliases(NAME)["challenger"] == "3"
    found = registry.version(NAME, "3")
    assert found is not None
    assert (found.tags["kasa.decision"], "is none any more" in found.tags["kasa.reason"]) == ("kept out", True)


def test_what_was_not_compared_with_the_champion_does_not_replace_it(registry: Registry) -> None:
    from types import SimpleNamespace as Facts

    register(registry, True)
    for promote, judged, refused in ((True, None, True), (True, "1", False), (False, None, False)):
        facts = Facts(champion_version=judged)
        if refused:
            with pytest.raises(ModelError, match="changed from none to version 1; run the same command again"):
                _check_champion(registry, NAME, facts, Facts(promote=promote))  # type: ignore[arg-type]
        else:
            _check_champion(registry, NAME, facts, Facts(promote=promote))  # type: ignore[arg-type]


def test_without_a_champion_the_newest_version_and_its_reason_are_named(kasa: Kasa, registry: Registry) -> None:
    register(registry, False)
    for command in (("generate", f"models:/{NAME}@champion", "hello"), ("promote", f"models:/{NAME}@champion")):
        code, _, err = kasa(*command)
        assert code == 2
        assert f"{NAME} has no champion: version 1 was kept out (because); it answers as models:/{NAME}/1" in err
        assert f"kasa promote models:/{NAME}/1" in err
    assert kasa("generate", f"models:/{NAME}@challenge", "hello")[2].strip().endswith("did you mean challenger?")


def test_promote_and_rollback(kasa: Kasa, registry: Registry) -> None:
    register(registry, True, False)
    code, out, _ = kasa("promote", f"models:/{NAME}@challenger", "--reason", "the  editors\nprefer it")
    assert (code, f"{NAME}: version 2 is the champion now" in out) == (0, True)
    assert f"back again: kasa rollback {NAME}" in out
    assert registry.aliases(NAME) == {"champion": "2", "previous": "1"}
    version = registry.version(NAME, "2")
    assert version is not None
    newest = history(version)[-1]
    assert (newest["what"], newest["reason"]) == ("promoted by hand", "the editors prefer it")
    assert newest["by"]
    assert newest["at"].endswith("+00:00")
    assert "the editors prefer it" in version.description
    assert kasa("promote", f"models:/{NAME}/2")[1].strip().endswith("version 2 is the champion already")
    code, out, _ = kasa("rollback", NAME, "--json")
    assert (code, json.loads(out)["champion"], json.loads(out)["previous"]) == (0, "1", "2")
    assert registry.aliases(NAME) == {"champion": "1", "previous": "2"}
    assert whats(registry, "2")[-1] == "rolled back"
    assert kasa("rollback", NAME)[0] == 0
    assert registry.aliases(NAME) == {"champion": "2", "previous": "1"}


def test_models(kasa: Kasa, registry: Registry) -> None:
    assert kasa("models")[1].strip() == "no model is registered yet; kasa run registers one"
    register(registry, True, False)
    _, out, _ = kasa("models")
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][:3] == [NAME, "2", "challenger"]
    assert lines[2][:4] == [NAME, "1", "champion", "promoted"]
    assert "+0.2500 [+0.2000, +0.3000] against the base" in out
    assert "abcdefabcdef " in out
    newest, oldest = json.loads(kasa("models", NAME, "--json")[1])
    assert (newest["version"], newest["aliases"], newest["decision"]) == ("2", ["challenger"], "kept out")
    assert (oldest["metric"], oldest["value"], oldest["difference"]["low"]) == ("accuracy", 0.9, 0.2)
    assert oldest["history"][0]["what"] == "promoted"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("models", "review"), "has no model review; did you mean reviews?"),
        (("rollback", "review"), "has no model review; did you mean reviews?"),
        (("rollback", NAME), "reviews has no previous champion to go back to: version 1 is its first champion"),
        (("promote", "models:/review/1"), "did you mean reviews?"),
        (("promote", "models:/reviews/7"), "reviews has no version 7; the newest are 1"),
        (("promote", "models:/reviews@champoin"), "reviews has no alias champoin; did you mean champion?"),
        (("promote", "models:/reviews"), "models:/reviews names no version; write models:/NAME/3"),
        (("promote", "reviews/1"), "reviews/1 names no version"),
    ],
)  # fmt: skip
def test_mistakes(kasa: Kasa, registry: Registry, arguments: tuple[str, ...], says: str) -> None:
    register(registry, True)
    code, out, err = kasa(*arguments)
    assert (code, out) == (2, "")
    assert says in " ".join(err.split())


def test_a_workspace_without_a_registry(kasa: Kasa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, _, err = kasa("models")
    assert (code, "work holds no MLflow database" in " ".join(err.split())) == (2, True)
