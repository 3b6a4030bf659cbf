"""Version 1 of the wire: generated messages and stubs."""
