"""Teachers: architectures, weights from anywhere, and the card that describes one."""
