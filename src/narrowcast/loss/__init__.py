"""Cross-entropy of a linear head without its logits, called directly or through a model's head."""
