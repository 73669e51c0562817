"""What labels mean."""

IGNORE_INDEX = -100
"""The label of a token whose prediction does not count: torch's own value."""
