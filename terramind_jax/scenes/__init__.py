"""Scenes of any size, window by window: where windows lie, what they read, how they are joined, and what is left of a broken run."""
