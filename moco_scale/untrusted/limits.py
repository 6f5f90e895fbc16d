"""How much of each document from outside is read, in bytes unless a name says otherwise.

Compared before anything is allocated. Each is far above what a real document has.
"""

from __future__ import annotations

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30

INDEX_JSON = 64 * MB
"""index.json: 1,282 shards of ImageNet take 0.2 MB."""
META_JSON = 16 * MB
"""meta.json of a checkpoint: some 20 kB."""
SETTINGS_JSON = 4 * MB
"""A user's own JSON: a DeepSpeed file, a hostfile's sibling, a results file."""

DOCUMENT_SECONDS = 120.0
"""A small document (an index, headers) has arrived whole within this time, or is given up."""

SAMPLES = 1 << 40
SHARD_BYTES = 1 << 50
"""Largest numbers of samples and bytes that an index may claim: sums of them fit 64 bits."""
NAME_BYTES = 255
"""A component of a path, in UTF-8: the limit of every file system in use."""

IMAGE_MEMORY = 1200 * 10**6
"""What decoding one image holds at its peak, computed from its header: pixels, a copy of them turned
or cropped, what the decoder itself needs. Enough for a telephone's JPEG of 200 million pixels."""
IMAGE_PIXELS = IMAGE_MEMORY // 6
"""Pixels of an image in the form that takes least: RGB, and a copy of it."""
SLOW_IMAGE_PIXELS = 1 << 24
"""Pixels of an image that is decoded by Python code, a few hundred thousand a second."""
IMAGE_SCANS = 100
"""Scans of a JPEG, each of which goes over all of it: cameras and tools write up to some 20."""
IMAGE_PARTS = 1 << 18
"""Chunks, segments, strips or tiles of an image, which are gone through one after the other."""
IMAGE_METADATA = 4 * MB
"""What is inflated of one text of an image to find its orientation."""
DEVICE_PIXELS = 1 << 28
"""Pixels that the training device decodes at once: 0.8 GB."""
