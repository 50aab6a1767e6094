"""Which layers a model has."""
