"""Relabel: soft labels of an ensemble of teachers on augmented, mixed views."""
