"""Defines inputs that several nodes share, and turns the values of inputs into what cache_core takes."""
