"""What each training process runs: DeepSpeed ZeRO, batches, checkpoints."""
