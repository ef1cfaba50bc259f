"""The frozen base: finding it, fetching it, knowing it, loading it.

Importing this package, `catalogue`, `fetch`, `identity` or `adapter_files` does not import torch.
"""
