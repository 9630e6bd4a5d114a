"""One run: its settings, its loop, its checkpoint and its record."""
