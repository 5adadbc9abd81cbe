"""What a serving engine keeps between the calls of the ops: states in slots, indices of a step."""
