"""The KaSA pipeline: prepare, spectra, train, evaluate, register; `pipeline.flow` is the place to start reading."""
