"""The local viewer: a page that shows saved runs and steers them, and a small server of its documents and pictures.

Imports nothing here, so that the package costs nothing until it is used.
"""
