"""Host side of training: shards, index, masks, crops, the embedded world and the pipeline. NumPy only; knows no networks."""
