"""One technique a file: its configuration, its hooks, and how it is applied."""
