"""Ready tasks: a loss taken apart, one small file each."""
