"""A dashboard of block topology over training runs."""

__version__ = "0.1.0"
