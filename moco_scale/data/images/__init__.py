"""Images: formats, decoding, crops and augmentation."""
