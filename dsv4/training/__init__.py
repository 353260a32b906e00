"""Training: the corpus, its tokenizer, batches of token ids, and everything that turns them into a model."""
