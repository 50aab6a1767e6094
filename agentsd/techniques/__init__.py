"""One technique a file: its configuration, what it does in a layer, and how it is applied."""
