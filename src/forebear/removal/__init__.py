"""What a model would be without some of its training examples."""
