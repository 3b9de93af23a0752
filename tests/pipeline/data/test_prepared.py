"""What is counted of a prepared split without reading its rows one by one."""

from datasets import Dataset, concatenate_datasets

from pipeline.data.prepared import label_counts, token_counts

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [5], "labels": [5]},
    {"input_ids": [8, 9, 8, 9], "labels": [8, -100, 8, -100]},
    {"input_ids": [], "labels": []},
    {"input_ids": [4, 4], "labels": [-100, -100]},
]


def test_counts_of_a_split_in_several_chunks() -> None:
    chunks = [Dataset.from_list(ROWS[:2]), Dataset.from_list(ROWS[2:]), Dataset.from_list(ROWS)]
    samples = concatenate_datasets(chunks)
    assert len(samples.data.column("labels").chunks) > 1
    assert token_counts(samples).tolist() == [3, 1, 4, 0, 2] * 2
    assert label_counts(samples).tolist() == [2, 0, 1, 0, 0] * 2
