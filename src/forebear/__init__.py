"""forebear."""
