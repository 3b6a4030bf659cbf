"""How far a head can be relied on: calibration, sets with a known coverage, intervals, and doubts about the data."""
