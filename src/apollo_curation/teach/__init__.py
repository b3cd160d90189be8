"""Facts as jobs that make them known and move little else: variants, near misses, replay, examination."""
