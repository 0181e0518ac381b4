"""Files that ship with the package: a small text and its vocabulary (README.md)."""
