"""How the next tokens are chosen and scored on the device that computes the model."""
