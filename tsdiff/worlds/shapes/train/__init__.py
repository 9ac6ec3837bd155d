"""The recipes that made the weights of the shapes world, and the one loop that runs them.

    python -m tsdiff.worlds.shapes.train --help

`loop` trains anything that is a `Recipe` and resumes bit-identically; `pictures` draws the data; `autoencoder`,
`denoiser`, `contrast` and `features` are the recipes, one model each.
"""
