"""WHERE features live in a network: found by watching one full evaluation, proved by skipping once."""
