"""Training loops, one straight file each, and the few pieces they share."""
