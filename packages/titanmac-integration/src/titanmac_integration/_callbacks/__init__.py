"""The topology in the training loops of other libraries."""
