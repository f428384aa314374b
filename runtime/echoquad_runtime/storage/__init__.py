"""Files on disk: atomic writes, file locks, directory walks, and how file names are printed in rows."""
