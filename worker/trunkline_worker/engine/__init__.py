"""Rows in, embeddings and predictions out: batching, the trunk, many heads on one pass. torch only."""
