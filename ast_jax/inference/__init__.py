"""Sounds to labels, timelines, embeddings, explanations, pictures, and exported programs."""
