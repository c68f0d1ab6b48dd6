"""Who says what a latent is about: one file, one kind."""
