"""The command line: one file a verb. Verbs import torch and pydantic only when they run, so that `--help` is quick."""
