"""Sources of rows: files, folders, splits on the hub and remote files, and their identity."""
