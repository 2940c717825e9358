"""Models of other libraries, explained with the names those libraries use."""
