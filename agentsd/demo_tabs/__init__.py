"""The parts of the web page: what visitors set, and one file a tab."""
