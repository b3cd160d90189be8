"""Dreams: scenarios from recent memory, answered, judged, trained."""
