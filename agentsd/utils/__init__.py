"""Loading, images, metrics, timing, memory, environment."""
