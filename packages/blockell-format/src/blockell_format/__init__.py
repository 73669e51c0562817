"""The Block-ELL block-sparse format and the topology snapshot file format."""

__version__ = "0.1.0"
