"""Answers graded by a language model."""
