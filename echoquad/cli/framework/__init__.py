"""What every command shares: application, options, console output, signals and checks for optional packages."""
