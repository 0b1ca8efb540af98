"""What families are made of: their description, the conservative arithmetic that several share, fused layers."""
