"""The tiny FLUX of Demo FLUX, whose weights ship with the pack in demo/."""
