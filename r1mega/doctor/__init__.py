"""``r1mega doctor``: what is installed, whether it works, what its absence switches off, and the command that adds it."""
