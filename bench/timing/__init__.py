"""What the benches share: sides that take turns, the harness that times and verifies them, batches, figures, frame."""
