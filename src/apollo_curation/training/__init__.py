"""What is chosen is submitted."""
