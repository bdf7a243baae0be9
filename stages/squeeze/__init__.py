"""Squeeze: train the missing teachers on the real data."""
