"""Base models: where they are, their shapes, heads, prompts, batches and losses."""
