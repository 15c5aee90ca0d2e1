"""What models do to data and what they cost: autocorrelation, memory, sizes."""
