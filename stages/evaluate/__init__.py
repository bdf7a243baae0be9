"""Evaluate: train students from scratch on images and soft labels, test them on real data."""
