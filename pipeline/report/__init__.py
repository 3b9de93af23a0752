"""The HTML page of a run: pure functions from facts to the page."""
