"""Makes files that are shipped or shown: example workflows, translations, and the demo's pictures."""
