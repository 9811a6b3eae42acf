"""The operations that the project is built around, each with its plain PyTorch definition beside it."""
