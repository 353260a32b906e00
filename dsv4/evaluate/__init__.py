"""What number formats cost in quality: a model under several recipes, compared on the same text."""
