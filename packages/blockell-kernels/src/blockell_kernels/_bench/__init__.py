"""Parts of `python -m blockell_kernels.bench`."""
