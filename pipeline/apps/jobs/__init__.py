"""Recipes as jobs on a Ray cluster."""
