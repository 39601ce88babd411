"""Differentiable discrete operators for PyTorch."""
