"""What comes from outside: files, servers, checkpoints, the store. Everything passes through here.

``limits`` says how much of each is read, ``documents`` turns JSON into checked values, ``names``
turns a name into a path below a folder, ``text`` makes foreign text fit to be shown. The schema of
each document stands in a file of its own. Nothing received decides where something is written.
"""
