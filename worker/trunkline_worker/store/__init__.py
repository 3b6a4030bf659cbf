"""What outlives a process: blobs, chunks of rows, cached embeddings, and the SQL that names them."""
