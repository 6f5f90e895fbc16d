"""kNN and linear evaluation of a pretrained encoder."""
