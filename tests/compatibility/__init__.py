"""Everything that diffusers users combine with a patched model: one test or more for each feature."""
