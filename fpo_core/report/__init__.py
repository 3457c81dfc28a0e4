"""The report of one run: a single HTML page and its charts, from plain values."""
