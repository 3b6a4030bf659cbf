"""Backbones: the catalogue, their weights, their cuts and the export of their stems. Torch only."""
