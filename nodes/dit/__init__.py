"""Loads class-conditional DiT (Peebles & Xie, arXiv 2212.09748), the first benchmark of the DuCa and ICC papers. ComfyUI cannot load it.

It is a loader and nothing else: the host samples, and cache_core/families/dit.py says how such a model is cached.
"""
