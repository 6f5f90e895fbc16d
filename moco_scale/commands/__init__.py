"""What a user types; nothing imports it."""
