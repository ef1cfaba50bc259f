"""Ranks that are processes (`torch_ranks.py`), and ranks that are threads, for tests (`thread_ranks.py`)."""
