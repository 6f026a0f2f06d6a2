"""Triton kernels, for machines whose build has no CUDA library. Importing needs triton."""
