"""A search policy and a verifier for tsdiff, found through entry points."""
