"""Result files of predictions: row formats (CSV, JSON lines), resume, shards and their merge."""
