"""Triton kernels, as operators that torch.compile and autograd know; triton itself is imported when one first runs."""
