"""Decides when to compute: the kinds of evaluations, plans, the policies that make plans, and the text in which users write them."""
