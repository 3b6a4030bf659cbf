"""What is written about a model: a report to look at, and a model card. Loaded when one is asked for."""
