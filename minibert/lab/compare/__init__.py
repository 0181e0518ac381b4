"""Every backend on one training step: compare runs and judges it, records holds what it found, facts turns that into a
document for JSON and page."""
