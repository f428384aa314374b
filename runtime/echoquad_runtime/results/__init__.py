"""Result files: CSV and JSON lines, resume, shards and their merge."""
