"""One contract, an implementation a file: per-token losses from embeddings, tensors only."""
