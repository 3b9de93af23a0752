"""`kasa compare`: several methods on the same data, steps and budget, and what the data say of them."""
