"""`simreg analyze`: the geometry of embeddings, from models and text to pictures."""
