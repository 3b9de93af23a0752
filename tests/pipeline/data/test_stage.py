"""The stage as a whole, and what the sources of a recipe stand for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import LlamaConfig

from pipeline.config.settings import DataSettings
from pipeline.core.errors import BaseModelError, DataError, WorkspaceError
from pipeline.data.prepare import prepare_dataset
from pipeline.data.prepared import COLUMNS, load_prepared
from pipeline.data.sources import DataSources, resolve_sources
from tests.support import ROOT

from .conftest import build_tokenizer, sources_of

Make = Callable[..., DataSettings]
SHARED = ROOT.parent / "shared" / "data"
ROWS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(60)]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def prepare(settings: DataSettings, sources: DataSources, tokenizer: Path, out: Path) -> dict[str, Any]:
    return prepare_dataset(settings, sources, tokenizer, 1024, out, lambda done, total: None)


def test_the_splits_hold_what_training_and_evaluation_need(
    tmp_path: Path, settings: Make, chat_folder: Path, chat_tokenizer: Any
) -> None:
    calls: list[tuple[int, int]] = []
    train = write_rows(tmp_path / "a.jsonl", ROWS)
    data = settings(prompt_template="Q: {prompt}", heldout_share=0.3)
    summary = prepare_dataset(
        data, sources_of(train), chat_folder, 1024, tmp_path / "out", lambda done, total: calls.append((done, total))
    )
    prepared = load_prepared(tmp_path / "out")
    assert prepared.summary == summary
    assert calls[-1] == (60, 60)
    assert tuple(prepared.train.column_names) == COLUMNS
    assert len(prepared.train) + len(prepared.heldout) == summary["rows_kept"] == 60
    assert not set(prepared.train["prompt"]) & set(prepared.heldout["prompt"])
    for row in prepared.train:
        start = row["input_ids"][: row["prompt_tokens"]]
        assert prepared.prompting.prompt_ids(chat_tokenizer, row["prompt"]) == start
        assert chat_tokenizer.decode(row["input_ids"][row["prompt_tokens"] :]) == f"{row['references'][0]}<|end|>"
        line = int(row["source"].rpartition(":")[2])
        assert ROWS[line - 1] == {"prompt": row["prompt"], "completion": row["references"][0]}
    assert summary["train_tokens"] == sum(map(len, prepared.train["input_ids"]))


def test_calibration_text_is_a_split_of_its_own_or_the_training_split(
    tmp_path: Path, settings: Make, chat_folder: Path
) -> None:
    train = write_rows(tmp_path / "train.jsonl", ROWS)
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "bad film", "completion": "good film"}] * 2)
    prepare(settings(), sources_of(train), chat_folder, tmp_path / "plain")
    plain = load_prepared(tmp_path / "plain")
    assert plain.calibration["input_ids"] == plain.train["input_ids"]
    assert sources_of(train).digest != sources_of(train, calibration=other).digest
    prepare(settings(), sources_of(train, calibration=other), chat_folder, tmp_path / "named")
    named = load_prepared(tmp_path / "named")
    assert named.calibration["prompt"] == ["bad film", "bad film"]
    assert named.train["input_ids"] == plain.train["input_ids"]
    assert named.heldout["input_ids"] == plain.heldout["input_ids"]


def test_prompts_are_learned_where_the_recipe_says_so(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", ROWS)
    summary = prepare(settings(train_on_prompt=True), sources_of(train), chat_folder, tmp_path / "out")
    prepared = load_prepared(tmp_path / "out")
    assert prepared.train["labels"] == prepared.train["input_ids"]
    assert summary["train_labelled_tokens"] == summary["train_tokens"]
    assert all(row["labels"][: row["prompt_tokens"]] == [-100] * row["prompt_tokens"] for row in prepared.heldout)


def test_the_same_rows_in_another_order_give_the_same_splits(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    contents = []
    for name, rows in (("a", ROWS), ("b", ROWS[::-1])):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        prepare(settings(train_rows=20), sources_of(path), chat_folder, tmp_path / name)
        prepared = load_prepared(tmp_path / name)
        contents.append([prepared.train["input_ids"][:], prepared.heldout["input_ids"][:]])
    assert contents[0] == contents[1]
    assert len(contents[0][0]) == 20


def test_the_written_bytes_repeat(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", ROWS)
    for out in ("one", "two"):
        prepare(settings(), sources_of(path), chat_folder, tmp_path / out)
    first = {
        file.relative_to(tmp_path / "one"): file.read_bytes()
        for file in (tmp_path / "one").rglob("*")
        if file.is_file()
    }
    second = {
        file.relative_to(tmp_path / "two"): file.read_bytes()
        for file in (tmp_path / "two").rglob("*")
        if file.is_file()
    }
    assert first == second


def test_unusable_rows_are_counted_named_and_limited(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    rows = [*ROWS, {"prompt": "p", "completion": ""}, {"prompt": "long", "completion": "word " * 200}]
    sources = sources_of(write_rows(tmp_path / "a.jsonl", rows))
    summary = prepare(settings(max_tokens=100, max_rejected_share=0.1), sources, chat_folder, tmp_path / "out")
    assert summary["rejected"] == {"completion is empty": 1, "longer than data.max_tokens (100)": 1}
    assert summary["rows_rejected"] == 2
    assert summary["longest_tokens"] <= 100
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == [f"{tmp_path}/a.jsonl:61", f"{tmp_path}/a.jsonl:62"]
    with pytest.raises(DataError) as caught:
        prepare(settings(max_tokens=100, max_rejected_share=0.02), sources, chat_folder, tmp_path / "other")
    for part in (
        "2 of 62 rows (3.2%)",
        "1 x completion is empty",
        "a.jsonl:61",
        "data.max_tokens",
        "data.max_rejected_share",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "other").exists()


def test_rows_in_which_nothing_is_learned_are_rejected_by_name(
    tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The template leaves one answer out, and ends with EOS where one is asked for; the tokenizer has no token for one text.
    template = "{% for m in messages if m['content'] != 'mute' %}{{ m['content'] }}<|end|>{% endfor %}"
    tokenizer = build_tokenizer(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    monkeypatch.setattr("pipeline.data.prepare.load_tokenizer", lambda folder: tokenizer)
    left_out = "the base's chat template leaves out the answer; choose a base whose template does not"
    nothing, text = "no token of it can be learned", [{"text": f"the film {number}"} for number in range(9)]
    for name, rows, reason in (
        ("chat", [*ROWS[:9], {"prompt": "p", "completion": "mute"}], left_out),
        ("plain", [*text, {"text": "\u200b"}], nothing),
        (
            "eos",
            [*ROWS[:9], {"prompt": "p", "completion": "<|end|>"}],
            "the answer is nothing but the end-of-sequence token",
        ),
    ):
        path = write_rows(tmp_path / f"{name}.jsonl", rows)
        summary = prepare(settings(max_rejected_share=0.5), sources_of(path), tmp_path, tmp_path / name)
        assert summary["rejected_first"] == [f"{path}:10: {reason}"]


def test_an_end_that_the_data_spells_out_is_not_doubled(
    tmp_path: Path, settings: Make, chat_folder: Path, chat_tokenizer: Any
) -> None:
    spelled = [row | {"completion": f"{row['completion']}<|end|>\n"} for row in ROWS]
    for name, rows in (("plain", ROWS), ("spelled", spelled)):
        prepare(settings(), sources_of(write_rows(tmp_path / f"{name}.jsonl", rows)), chat_folder, tmp_path / name)
    plain, without = load_prepared(tmp_path / "plain"), load_prepared(tmp_path / "spelled")
    for side in ("train", "heldout"):
        for column in ("input_ids", "labels", "references"):
            assert sorted(getattr(plain, side)[column]) == sorted(getattr(without, side)[column])


def test_what_the_summary_says_of_columns_and_context(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": "wrong", "weight": 0},
                {"role": "user", "content": "sure?"},
                {"role": "assistant", "content": "right", "weight": 1},
            ],
            "id": number,
        }
        for number in range(20)
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    summary = prepare(settings(), sources_of(path), chat_folder, tmp_path / "out")
    assert summary["unread"] == {"id": f"{path}:1"}
    with pytest.raises(DataError, match=r"weight 0 contradicts data\.train_on_prompt: true"):
        prepare(settings(train_on_prompt=True), sources_of(path), chat_folder, tmp_path / "other")


def test_a_named_heldout_source_is_used_whole(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    sources = sources_of(write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", ROWS[:5]))
    summary = prepare(settings(), sources, chat_folder, tmp_path / "out")
    assert (summary["train_rows"], summary["heldout_rows"], summary["leaked_removed"]) == (55, 5, 5)


def test_plain_text_has_no_reference(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(30)))
    assert prepare(settings(), sources_of(path), chat_folder, tmp_path / "out")["form"] == "completion"
    prepared = load_prepared(tmp_path / "out")
    assert {(*row["references"], row["prompt"], row["prompt_tokens"]) for row in prepared.train} == {("", 0)}
    assert not prepared.prompting.chat_template


def test_settings_beyond_the_base_are_errors(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    sources = sources_of(write_rows(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(DataError, match=r"data\.max_tokens 2048 is more than the 1024"):
        prepare(settings(max_tokens=2048), sources, chat_folder, tmp_path / "out")
    with pytest.raises(BaseModelError, match="no tokenizer"):
        prepare(settings(), sources, tmp_path, tmp_path / "out")


def test_a_damaged_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkspaceError, match=r"summary\.json"):
        load_prepared(tmp_path)


def test_files_globs_and_folders_are_resolved_by_content(tmp_path: Path, settings: Make) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        write_rows(folder / name, [{"text": name}])
    folder.joinpath("README.md").write_text("not data")
    resolved = [resolve_sources(settings(train=str(entry)), tmp_path) for entry in (folder, folder / "*.jsonl")]
    assert [[file.path.name for file in each.train] for each in resolved if each] == [["a.jsonl", "b.jsonl"]] * 2
    before = resolved[0]
    moved = folder.rename(tmp_path / "moved")
    after = resolve_sources(settings(train=[str(moved / "b.jsonl"), str(moved / "a.jsonl")]), tmp_path)
    assert before is not None
    assert after is not None
    assert before.digest == after.digest
    write_rows(moved / "a.jsonl", [{"text": "changed"}])
    changed = resolve_sources(settings(train=str(moved)), tmp_path)
    assert changed is not None
    assert changed.digest != before.digest


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("trian.jsonl", "did you mean train.jsonl"),
        ("*.csv", "matches no file"),
        ("notes.md", "of no known format"),
        ("empty", "holds no"),
        ("hub:a b", "must have the form hub:OWNER/NAME"),
        ("embedded:movie-review", "did you mean movie-reviews"),
    ],
)
def test_a_source_that_is_not_there_is_explained(
    tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    write_rows(tmp_path / "train.jsonl", ROWS)
    tmp_path.joinpath("notes.md").write_text("x")
    tmp_path.joinpath("empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        resolve_sources(settings(train=entry), tmp_path / "workspace")


def test_hub_splits_are_stored_once(tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[tuple[str, str | None, str, str]] = []

    def load(name: str, subset: str | None, split: str, revision: str) -> datasets.Dataset:
        calls.append((name, subset, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = settings(train="hub:owner/set@v1:validation")
    assert resolve_sources(data, tmp_path, fetch=False) is None
    assert not list(tmp_path.iterdir())
    first = resolve_sources(data, tmp_path)
    assert first == resolve_sources(data, tmp_path) == resolve_sources(data, tmp_path, fetch=False)
    assert calls == [("owner/set", None, "validation", "v1")]
    resolve_sources(settings(train="hub:owner/set/part@v1:validation"), tmp_path)
    assert calls[1:] == [("owner/set", "part", "validation", "v1")]


def test_an_unreachable_hub_is_explained(tmp_path: Path, settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, subset: str | None, split: str, revision: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="hub:owner/set@v1:train cannot be fetched from the hub: no route"):
        resolve_sources(settings(train="hub:owner/set@v1"), tmp_path)


@pytest.mark.parametrize(
    ("train", "values", "rows"),
    [
        ("e2e/valid.txt", {"separator": "||", "prompt_template": "Restaurant data: {prompt}\nSentence:"}, 4672),
        ("commonsense/ARC-Challenge/train.json", {}, 1119),
    ],
)
def test_real_data_prepares(tmp_path: Path, chat_folder: Path, train: str, values: dict[str, Any], rows: int) -> None:
    if not (SHARED / train).exists():
        pytest.skip(f"{SHARED / train} is not here")
    data = DataSettings(train=[str(SHARED / train)], max_tokens=1000, **values)
    sources = resolve_sources(data, tmp_path)
    assert sources is not None
    summary = prepare(data, sources, chat_folder, tmp_path / "out")
    assert summary["rows_read"] == rows
    assert summary["rows_rejected"] == 0
    assert summary["rows_kept"] + summary["duplicates_removed"] == rows


def _heldout(folder: Path) -> list[tuple[str, list[str]]]:
    return sorted((row["prompt"], sorted(row["references"])) for row in load_prepared(folder).heldout)


def test_references_of_a_row_are_joined_always_those_of_a_prompt_where_the_recipe_says_so(
    tmp_path: Path, settings: Make, chat_folder: Path, chat_tokenizer: Any
) -> None:
    rows = [{"prompt": "good", "references": ["a", "b"]}, {"prompt": "good", "references": ["c"]}]
    rows += [{"prompt": "bad", "references": ["d"]}]
    sources = sources_of(write_rows(tmp_path / "a.jsonl", ROWS), write_rows(tmp_path / "b.jsonl", rows))
    summary = prepare(settings(), sources, chat_folder, tmp_path / "rows")
    assert _heldout(tmp_path / "rows") == [("bad", ["d"]), ("good", ["a", "b"]), ("good", ["c"])]
    assert (summary["heldout_rows"], summary["heldout_references"], summary["rows_read"]) == (3, 4, 63)
    prepare(settings(group_references=True), sources, chat_folder, tmp_path / "prompts")
    assert _heldout(tmp_path / "prompts") == [("bad", ["d"]), ("good", ["a", "b", "c"])]
    # The loss is over the first.
    for row in load_prepared(tmp_path / "prompts").heldout:
        assert chat_tokenizer.decode(row["input_ids"][row["prompt_tokens"] :]) == f"{row['references'][0]}<|end|>"
    one = prepare(settings(group_references=True, heldout_rows=1), sources, chat_folder, tmp_path / "one")
    assert one["heldout_rows"] == 1  # a limit counts prompts then


def test_in_training_each_reference_is_a_sample(tmp_path: Path, settings: Make, chat_folder: Path) -> None:
    rows = [{"prompt": f"question {number}", "references": ["a", "b"]} for number in range(30)]
    sources = sources_of(write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", rows[:3]))
    summary = prepare(settings(group_references=True), sources, chat_folder, tmp_path / "out")
    assert (summary["train_rows"], summary["heldout_rows"]) == (54, 3)
    assert {tuple(row["references"]) for row in load_prepared(tmp_path / "out").train} == {("a",), ("b",)}


def test_a_token_that_the_base_has_no_embedding_for_is_named(
    tmp_path: Path, settings: Make, chat_tokenizer: Any
) -> None:
    folder = tmp_path / "base"
    tokenizer = copy.deepcopy(chat_tokenizer)
    count = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    LlamaConfig(vocab_size=count).save_pretrained(folder)
    train = write_rows(tmp_path / "a.jsonl", ROWS)
    assert prepare(settings(), sources_of(train), folder, tmp_path / "out")["train_rows"]
    train = write_rows(tmp_path / "b.jsonl", [*ROWS, {"prompt": "one <extra>", "completion": "two"}])
    with pytest.raises(BaseModelError, match=f"token {count}, '<extra>'.* 0 to {count - 1} alone"):
        prepare(settings(), sources_of(train), folder, tmp_path / "again")
