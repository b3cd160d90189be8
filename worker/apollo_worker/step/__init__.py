"""One step: forward, backward, loss."""
