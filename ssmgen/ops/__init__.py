"""The tensor-level functions users call."""
