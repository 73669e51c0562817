"""The TitanMAC transformer with block-sparse layers, training and continual-learning commands."""

__version__ = "0.1.0"
