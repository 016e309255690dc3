"""What embeddings look like: tensors in, numbers out. Nothing here is V×V, K×K or L×L."""
