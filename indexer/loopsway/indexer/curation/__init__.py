"""What curators and researchers ask of a whole index: every score, self-influence, neighbours, energies of steps."""
