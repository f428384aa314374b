"""The search for the fastest settings of a host, and where they are saved."""
