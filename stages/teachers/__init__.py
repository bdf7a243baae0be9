"""Teachers: architectures, weights, and the adapter between the run's data and a network."""
