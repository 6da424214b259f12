"""What the reader raises."""


class DataError(Exception):
    """A shard or sample that cannot be read; the message is one sentence naming it."""
