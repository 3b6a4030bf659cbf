"""Many configurations of a head at once, scored by cross-validation: the computation behind ``client.sweep``."""
