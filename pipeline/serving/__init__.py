"""A base with an adapter that answers: generation, the registered model, export."""
