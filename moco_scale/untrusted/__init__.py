"""Untrusted input: files, servers, checkpoints, the store. All of it passes through here.

``limits`` bounds how much of each is read, ``documents`` turns JSON into checked values, ``names``
turns a name into a path below a folder. The schema of each document has a module of its own.
Nothing received decides where something is written.
"""
