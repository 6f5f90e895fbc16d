"""Limits of documents from outside, in bytes unless a name tells otherwise.

Compared before anything is allocated. Each is far above a real document.
"""

from __future__ import annotations

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30

INDEX_JSON = 32 * MB
"""index.json: 1,282 shards of ImageNet take 0.2 MB."""
CONTAINERS = 1 << 20
"""Lists and objects of a JSON document: each takes 60 bytes and more of memory, and 2 of text."""
META_JSON = 16 * MB
"""meta.json of a checkpoint: some 20 kB."""
SETTINGS_JSON = 4 * MB
"""A user's own JSON: a DeepSpeed file, a hostfile's sibling, a results file."""
SETTINGS_FILE, SETTINGS_BRACKETS = 16 * KB, 256
"""The file of --config: a run's config.json has 3 kB and 3 brackets. Parsers of TOML and YAML take
time that grows with the square of dots and of open brackets."""
CHECKPOINT_INDEX = 16 * MB
"""A checkpoint's .metadata: 0.1 MB for two ResNet-50s."""
PICKLE = 16 * MB
"""The pickle in a file of torch.save, without its tensors: 0.1 MB for two ResNet-50s."""
TENSOR_FILE_DIRECTORY = 8 * MB
"""The list of records in a file of torch.save: 0.1 MB for two ResNet-50s."""

PICKLE_STEPS = 1_000_000
"""Opcodes of a pickle, and values in it with each shared one counted wherever it stands."""
PICKLE_TEXT = 64 * KB
PICKLE_DEPTH = 64
"""Bytes of one text in a pickle; containers inside each other."""
IMAGE_SIZE = 4096
"""Pixels a side of the images that a model file may ask for."""

LINE = 1 * MB
"""A line of metrics.jsonl or of another list: a record takes some 600 bytes."""
STEPS = 1 << 53
"""Largest number of a step, an epoch or an image: whole as a float too."""

DOCUMENT_SECONDS = 120.0
"""A small document (an index, headers) has arrived whole within this time, or is given up."""

NETRC = 1 * MB
"""netrc, where credentials are."""
NPY_HEADER = 1 * KB
"""Header before the rows of an index: 192 bytes."""
HEAD_BYTES = 256 * KB
"""Status line and headers of an HTTP answer: some kB."""
LEAST_RATE = 1000.0
"""Bytes a second below which a file counts as standing still."""

SAMPLES = 1 << 40
SHARD_BYTES = 1 << 50
"""Largest numbers of samples and bytes that an index may claim: sums of them fit 64 bits."""
CLASSES = 1 << 20
LABEL_CHARACTERS = 1000
"""Classes of a set, and characters of the name of one, which is mostly that of a folder."""
NAME_BYTES = 255
"""A component of a path, in UTF-8: the limit of every file system in use."""

TAR_EXTENDED_HEADER = 1 * MB
"""Headers before a member in a tar: names of 4 KB at most, times and attributes."""
MEMBERS_OF_A_SAMPLE = 1 << 20
"""Files of a tar whose names are alike up to the first dot: they are held at once."""
IMAGE_FILE = 1 * GB
"""An encoded image: 179 million pixels of 16 bits, as they are, just fit."""
LABEL_TEXT = 64 * KB
LABEL_JSON = 4 * MB
"""The .cls or .json of a sample; masks and polygons of a whole image take some hundred kB."""
TAR_LOOKED_INTO = 64 * MB
"""Start of a compressed tar, unpacked only to recognise it."""
TARS_OF_A_PATTERN = 1 << 20
"""Names that the braces of a pattern may stand for."""

SOURCE_INFLATION, SOURCE_INFLATION_FROM = 100, GB
"""A compressed tar of images grows at most so many times, beyond the first gigabyte."""
ZIP_DIRECTORY = 4 * GB
"""The list of files in a zip, which is read in parts: some 100 bytes a file."""
GROUND_TRUTH = 64 * MB
"""A list of images and their classes: a million lines of 60 bytes."""
IMAGE_MEMORY = 1200 * 10**6
"""Peak memory of decoding one image, computed from its header: pixels, a copy of them
turned or cropped, what the decoder needs. Enough for a telephone's JPEG of 200 million pixels."""
IMAGE_PIXELS = IMAGE_MEMORY // 6
"""Pixels of an image in the form that takes least: RGB, and a copy of it."""
SLOW_IMAGE_PIXELS = 1 << 24
"""Pixels of an image that is decoded by Python code, a few hundred thousand a second."""
IMAGE_SCANS = 100
"""Scans of a JPEG, each of which goes over all of it: cameras and tools write up to some 20."""
IMAGE_PARTS = 1 << 18
"""Chunks, segments, strips or tiles of an image, which are gone through one after the other."""
IMAGE_METADATA = 4 * MB
"""Inflated bytes of one text of an image, to find its orientation."""
DEVICE_PIXELS = 1 << 28
"""Pixels that the training device decodes at once: 0.8 GB."""
