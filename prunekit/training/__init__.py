"""What surrounds a training by ms-swift: before it, within it, and publishing what it wrote."""
