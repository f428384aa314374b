"""The outbox: sends each result to each destination, until the destination has it or refuses it."""
