"""Task layers on the embedding, and the file they are kept in. torch only."""
