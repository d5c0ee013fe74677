"""What a checkpoint becomes for serving, and what that gains."""
