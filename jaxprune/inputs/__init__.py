"""What a user gives -> token ids and pixels: on the host alone."""
