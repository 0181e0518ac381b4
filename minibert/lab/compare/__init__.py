"""Every backend on one training step: compare runs and judges it, facts turns it into a document for JSON and page."""
