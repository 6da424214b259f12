"""Downstream tasks: decoders and heads on the features of TerraMind, their losses, and whole fine-tuned models."""
