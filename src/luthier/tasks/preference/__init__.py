"""Preferences: which of two replies is the better."""
