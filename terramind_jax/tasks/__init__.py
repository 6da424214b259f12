"""Downstream tasks: data sets, decoders and heads on the features of TerraMind, their losses, and fine-tuning."""
