"""The host side of a run: it knows loops and no method."""
