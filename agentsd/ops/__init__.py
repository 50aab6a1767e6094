"""Pure functions of tensors: the mathematics."""
