"""Class-conditional DiT (Peebles & Xie, arXiv 2212.09748): the first benchmark of the DuCa and ICC papers, which ComfyUI cannot load.

A small loader and nothing else: sampling is the host's own, and cache_core/families/dit.py says how such a model is cached.
"""
