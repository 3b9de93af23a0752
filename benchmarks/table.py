"""The figures in the documentation, made from the records: `python -m benchmarks.table [--check]`.

`docs/benchmarks.md` lists every record, `README.md` those of `FIGURES`; each between two markers of its own.

Exit codes: 0 written or current; 1 (`--check`) out of date; 2 a page lacks its markers, or a record is damaged or missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.core import RESULTS, ROOT, Record, bar_text, read_records, with_unit

# What matters most to somebody who chooses whether to use this.
FIGURES = ("demo-gain", "e2e", "spectra-model", "plan", "cache-noop", "eval-scaling")


@dataclass(frozen=True)
class Block:
    """A part of a page that is made from the records.

    Attributes:
        page: The file, relative to the root of the pages.
        name: What its markers are called: `<!-- NAME:start -->` and `<!-- NAME:end -->`.
        lines: Makes the lines from the records and the way from the page's folder to theirs.
    """

    page: Path
    name: str
    lines: Callable[[Sequence[Record], str], list[str]]

    def filled(self, text: str, lines: Sequence[str]) -> str:
        """Return the page's text with the lines between the two markers replaced.

        Raises:
            ValueError: The markers are missing, repeated or in the wrong order.
        """
        start, end = f"<!-- {self.name}:start -->", f"<!-- {self.name}:end -->"
        if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
            raise ValueError(f"needs one {start} and, below it, one {end}")
        before, rest = text.split(start)
        after = rest.split(end)[1]
        return before + "\n".join([start, *lines, end]) + after


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the blocks, or only compare them."""
    parser = argparse.ArgumentParser("python -m benchmarks.table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    parser.add_argument("--pages", type=Path, default=ROOT, help="the folder with README.md and docs/")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    stale = False
    for block in BLOCKS:
        page = options.pages / block.page
        try:
            old = page.read_text(encoding="utf-8")
            records = os.path.relpath(options.results, page.parent)
            new = block.filled(old, block.lines(read_records(options.results), records))
        except (OSError, ValueError) as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 2
        if new == old:
            continue
        stale = True
        if options.check:
            print(f"{page} is out of date: run python -m benchmarks.table", file=sys.stderr)
        else:
            page.write_text(new, encoding="utf-8")
    return 1 if stale and options.check else 0


def all_records(records: Sequence[Record], folder: str) -> list[str]:
    """The lines of a table with a row for every record."""
    return _table(
        ("check", "what", "measured", "bar", "met", "machine", "date"),
        [
            (
                _linked(record, folder),
                record.what,
                with_unit(record.measured, record.unit),
                bar_text(record),
                _met(record),
                machine_text(record),
                record.date[:10],
            )
            for record in records
        ],
    )


def chosen_figures(records: Sequence[Record], folder: str) -> list[str]:
    """The lines of a table with a row for each of `FIGURES`, in their order.

    Raises:
        ValueError: One of them was not measured.
    """
    by_name = {record.name: record for record in records}
    if missing := [name for name in FIGURES if name not in by_name]:
        raise ValueError(f"there is no record of {', '.join(missing)}; run python -m benchmarks {' '.join(missing)}")
    return _table(
        ("what", "measured", "bar", "met", "record"),
        [
            (
                record.what,
                with_unit(record.measured, record.unit),
                bar_text(record),
                _met(record),
                _linked(record, folder),
            )
            for record in (by_name[name] for name in FIGURES)
        ],
    )


BLOCKS = (
    Block(Path("docs", "benchmarks.md"), "benchmarks", all_records),
    Block(Path("README.md"), "figures", chosen_figures),
)


def machine_text(record: Record) -> str:
    """The hardware in a few words; GPUs only where the check used them."""
    cores = record.machine["cores"]
    text = f"{record.machine['processor']}, {cores} {'core' if cores == '1' else 'cores'}"
    return f"{record.machine['gpus']}; {text}" if record.machine.get("device") == "cuda" else text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown with an empty line before and after; nothing without rows."""
    if not rows:
        return []
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *escaped)), ""]


def _linked(record: Record, folder: str) -> str:
    return f"[`{record.name}`]({folder}/{record.name}.json)"


def _met(record: Record) -> str:
    return "yes" if record.met else "**no**"


if __name__ == "__main__":
    sys.exit(main())
