"""What protects the routes: checks of each request, limits of bodies and connections, and safe answers."""
