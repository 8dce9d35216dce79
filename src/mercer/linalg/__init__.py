"""Batched linear algebra on plain tensors. Nothing here knows what a kernel or a Gaussian process is."""
