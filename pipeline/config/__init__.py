"""The recipe: its sections with every setting, the recipes that come along, and DeepSpeed's files."""
