"""Backbones, heads and grouped BatchNorm."""
