"""The search for the fastest configuration of a bundle on this host, and the file that saves it."""
