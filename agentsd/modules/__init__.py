"""Layers to build models of and to train."""
