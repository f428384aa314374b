"""The unit of systemd that runs the bedside service: ``echoquad.service``, and examples of drop-ins for it."""
