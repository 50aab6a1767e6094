"""How techniques run inside a model: steps, state, processors. Names no technique."""
