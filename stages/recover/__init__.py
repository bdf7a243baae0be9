"""Recover: optimise pixels against frozen teachers."""
