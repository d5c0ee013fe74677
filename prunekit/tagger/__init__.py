"""Token classifiers (named entities) on encoders."""
