"""Downstream tasks: data sets, decoders, losses, fine-tuning, and the paper's evaluations."""
