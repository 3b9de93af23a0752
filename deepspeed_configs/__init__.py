"""DeepSpeed JSON files that a recipe names in `train.deepspeed`.

They hold DeepSpeed's own decisions only: ZeRO stage, buckets, overlap, offload, persistence. Batch, precision, learning
rate and clipping live in the recipe; `pipeline.config.deepspeed.complete_config` adds them.
"""
