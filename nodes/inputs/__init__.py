"""What the nodes' inputs are and mean, where several nodes share them."""
