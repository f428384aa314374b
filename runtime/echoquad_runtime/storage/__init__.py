"""Files on disk: atomic writes of files and folders, file locks, regular files, directory walks, names in rows."""
