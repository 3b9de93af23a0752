"""A run of the pipeline: the stage graph, the stages, and the context they share."""
