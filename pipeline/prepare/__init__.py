"""The first stage: files to tokenised training and held-out splits. `stage.prepare_dataset` is the place to start."""
