"""Layers: linear maps, normalisation, rotary positions, embedding, loss, and their kernels."""
