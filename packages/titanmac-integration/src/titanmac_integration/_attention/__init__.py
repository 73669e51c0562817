"""Attention: over a sliding window, and over the segments of a model with memory as context."""
