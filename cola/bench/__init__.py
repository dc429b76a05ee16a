"""The computation evaluation in parts: rows, made-up batches, what takes part, and measuring."""
