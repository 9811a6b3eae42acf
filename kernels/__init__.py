"""Fused operations, each with its definition in plain PyTorch in the same file."""
