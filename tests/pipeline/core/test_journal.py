"""Journals survive the death of their writer, and readers see each record once."""

import json

import pytest

from pipeline.core.files import JournalTail, JournalWriter, append_journal, read_journal, rewrite_journal


def records(*steps: int) -> list[dict]:
    return [{"step": step} for step in steps]


def test_append_and_read(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_journal(path) == []
    append_journal(path, records(1, 2))
    append_journal(path, records(3))
    assert read_journal(path) == records(1, 2, 3)


def test_a_torn_last_line_is_ignored_and_cut_off(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    append_journal(path, records(1, 2))
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert read_journal(path) == records(1, 2)
    assert JournalTail(path).new_records() == records(1, 2)
    assert rewrite_journal(path, keep=lambda record: True) == records(1, 2)
    append_journal(path, records(3))
    assert read_journal(path) == records(1, 2, 3)


def test_a_tail_gives_each_record_once_and_waits_for_whole_lines(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    tail = JournalTail(path)
    assert tail.new_records() == []
    append_journal(path, records(1, 2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    assert tail.new_records() == records(1)
    assert tail.new_records() == []
    with path.open("ab") as file:
        file.write(whole[-10:])
    assert tail.new_records() == records(2)


def test_after_a_rewrite_a_tail_starts_again(tmp_path) -> None:
    path = tmp_path / "deep" / "journal.jsonl"
    assert rewrite_journal(path, keep=lambda record: True) == []
    append_journal(path, records(1, 2, 3))
    tail = JournalTail(path)
    assert tail.new_records() == records(1, 2, 3)
    assert rewrite_journal(path, keep=lambda record: record["step"] <= 2) == records(1, 2)
    append_journal(path, records(3, 4))
    assert tail.new_records() == records(1, 2, 3, 4)
    assert [file.name for file in path.parent.iterdir()] == ["journal.jsonl"]


def test_a_writer_that_was_replaced_reaches_no_reader(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    first = JournalWriter(path, keep=lambda record: True)
    first.append(records(1, 2, 3))
    assert first.is_current()
    second = JournalWriter(path, keep=lambda record: record["step"] <= 2)
    assert second.kept == records(1, 2)
    first.append(records(4))
    second.append(records(3))
    assert read_journal(path) == records(1, 2, 3)
    assert second.is_current()
    assert not first.is_current()


@pytest.mark.parametrize(
    "damage", [(b": 2", b": 7"), (b'"step": 2', b'"stop": 2'), (b'"}', b'"'), (b'"step"', b"\xff\n"), (b"{", b"")]
)
def test_a_damaged_record_counts_as_never_written(tmp_path, damage) -> None:
    path = tmp_path / "journal.jsonl"
    append_journal(path, records(1, 2, 3))
    first, second, third = path.read_bytes().splitlines(keepends=True)
    assert damage[0] in second
    path.write_bytes(first + second.replace(*damage) + third)
    assert read_journal(path) == records(1, 3)
    assert JournalTail(path).new_records() == records(1, 3)
    assert JournalWriter(path, keep=lambda record: True).kept == records(1, 3)
    assert path.read_bytes() == first + third


def test_a_line_is_json_for_other_programs(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    append_journal(path, records(1))
    assert json.loads(path.read_text())["step"] == 1
