"""From sources to the prepared dataset: readers, row forms, split, tokenisation."""
