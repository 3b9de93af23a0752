"""What the first rows show to be wrong with the data, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.settings import DataSettings
from pipeline.core.errors import DataError
from pipeline.data.first_rows import LOOKED_AT, FirstRows, check_first_rows


@pytest.mark.parametrize(
    ("files", "values", "labelled", "message"),
    [
        ({"a.jsonl": '{"question": "q"}\n'}, {}, False, "columns question fit no form"),
        ({"a.jsonl": '{"prompt": "p"}\n'}, {"columns": {"completion": "answr"}}, False, "data.columns maps completion"),
        ({"a.jsonl": "\n"}, {}, False, "a.jsonl holds no rows"),
        ({"a.csv": "text\nx\n", "b.csv": ""}, {}, False, "b.csv holds no rows"),
        ({"a.json": "{}"}, {}, False, "not a list of objects"),
        ({"a.parquet": "x"}, {}, False, "damaged parquet"),
        ({"a.jsonl": '{"text": "t", "label": 1}\n'}, {"form": "labelled"}, False, "need a head to learn it"),
        ({"a.jsonl": '{"text": "t"}\n'}, {}, True, "fit not the form labelled"),
        ({"a.txt": "x\n"}, {"separator": "|"}, True, "fit not the form labelled"),
    ],
)
def test_the_first_rows_show_mistakes_before_anything_is_started(
    tmp_path: Path, files: dict[str, str], values: dict[str, Any], labelled: bool, message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    paths = sorted(tmp_path.iterdir())
    with pytest.raises(DataError) as caught:
        check_first_rows(
            DataSettings(train=["rows"], **values),
            [paths[:1], paths[1:], []],
            "classification" if labelled else "language-model",
        )
    assert message in str(caught.value)


def test_the_first_rows_of_good_data_pass(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"p {n}", "completion": "c"}) + "\n" for n in range(LOOKED_AT + 1))
    (tmp_path / "a.jsonl").write_text(rows + "{broken")
    seen = check_first_rows(DataSettings(train=["rows"]), [[tmp_path / "a.jsonl"], [], []], "language-model")
    assert seen == FirstRows("prompt-completion")


def test_of_few_rows_it_is_known_which_are_held_out(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"prompt": f"p {n}", "completion": "c"}) + "\n" for n in range(30))
    (tmp_path / "a.jsonl").write_text(rows)
    settings = DataSettings(train=["rows"], heldout_rows=4)
    seen = check_first_rows(settings, [[tmp_path / "a.jsonl"], [], []], "language-model")
    assert seen.heldout is not None
    assert len(seen.heldout) == 4
    assert check_first_rows(settings, [[tmp_path / "a.jsonl"], [], []], "language-model", whole=False).heldout is None
