"""Pure functions: tensors or rows in, frozen dataclasses out. No files, network, clock or global RNG."""
