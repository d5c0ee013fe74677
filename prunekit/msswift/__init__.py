"""What is known of ms-swift without importing it."""
