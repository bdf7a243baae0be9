"""``prism search``: teacher pools, weights and any other field, found by measuring."""
