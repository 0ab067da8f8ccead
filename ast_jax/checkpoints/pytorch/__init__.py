"""PyTorch's files, without PyTorch: read, name, convert, write back, and prove that nothing changed."""
