"""Benchmark protocols, one a file: what a model generates and what its features say, beside the numbers that were published."""
