"""The model: layers put together, its state, its files, and the way from dense to sparse."""
