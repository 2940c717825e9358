"""Studies: questions of the field, asked of real models by one command each."""
