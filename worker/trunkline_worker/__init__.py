"""The worker: backbones, heads, training and serving on a Ray cluster."""
