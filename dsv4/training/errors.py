"""The error of everything that makes training data."""


class DataError(ValueError):
    """Text, tokens or a tokenizer that cannot be trained on: the message says what is wrong and what to do."""
