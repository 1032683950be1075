"""One file per export format; the file's name is the format's name."""
