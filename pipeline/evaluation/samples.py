"""Per-sample results as a parquet file: one row a sample, whatever its evaluator found out about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.journal import Record


def write_samples(path: Path, records: Sequence[Record]) -> None:
    """Write results; a field that a record lacks is null in its row."""
    import pyarrow as pa
    import pyarrow.parquet

    fields = dict.fromkeys(field for record in records for field in record)
    table = pa.table({field: [record.get(field) for record in records] for field in fields})
    pyarrow.parquet.write_table(table, path)


def read_samples(path: Path) -> list[Record]:
    """The results as they were written."""
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(path).to_pylist()
    return [{field: value for field, value in row.items() if value is not None} for row in rows]
