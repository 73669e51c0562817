"""CMSBlockLinear: a drop-in nn.Linear whose block topology changes while the network learns."""

__version__ = "0.1.0"
