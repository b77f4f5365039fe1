"""One file for each family of file formats: bytes to shapes, in memory and without side effects."""
