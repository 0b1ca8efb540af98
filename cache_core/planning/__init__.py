"""When to compute: kinds of evaluations, plans of them, the policies that make plans, and the text that users write them in."""
