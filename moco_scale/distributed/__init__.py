"""Ranks: how they meet, what they send each other, and that they agree."""
