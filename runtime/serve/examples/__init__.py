"""latentrt inside other people's programs. Each is run by a test."""
