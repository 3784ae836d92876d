"""The decode step: its sequences, their slots in the KV buffers, and the step's compiled form."""
