"""Pretrained networks: the catalogue, where they can be cut, their weights, and the export of stems. torch only."""
