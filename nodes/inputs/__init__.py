"""Defines inputs that several nodes share, and turns inputs into what the core takes."""
