"""Weights in and out: rules between our variables and the reference's state dicts, and the files that hold them."""
