"""Makes what is shipped or shown: example workflows, translations, and the demo's pictures."""
