"""Groups of commands, one file each; `forebear.cli` registers them."""
