"""Journals survive the death of their writer, and readers see each record once."""

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
    append_journal(path, records(1))
    with path.open("ab") as file:
        file.write(b'{"step"')
    assert tail.new_records() == records(1)
    assert tail.new_records() == []
    with path.open("ab") as file:
        file.write(b": 2}\n")
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
