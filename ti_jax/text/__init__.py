"""From prompts to token ids and prompt embeddings."""
