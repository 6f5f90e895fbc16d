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
"""Pixels a side of the pictures that a model file may ask for."""

LINE = 1 * MB
"""A line of metrics.jsonl or of another list: a record takes some 600 bytes."""
STEPS = 1 << 53
"""Largest number of a step, an epoch or an image: whole as a float too."""

DOCUMENT_SECONDS = 120.0
"""A small document (an index, headers) has arrived whole within this time, or is given up."""

SAMPLES = 1 << 40
SHARD_BYTES = 1 << 50
"""Largest numbers of samples and bytes that an index may claim: sums of them fit 64 bits."""
NAME_BYTES = 255
"""A component of a path, in UTF-8: the limit of every file system in use."""
