"""Folders to parameters and back: Orbax folders, the Hub, resizing to another input, and `load` on top of all."""
