"""Luthier: fine-tuning of open language models, as a service that you own and on your own compute."""

__version__ = "0.1.0"
