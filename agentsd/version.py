"""The version, where whatever needs it finds it without the package."""

__version__ = "0.1.0"
