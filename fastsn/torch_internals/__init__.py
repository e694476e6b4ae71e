"""What is read of torch's insides, one module for each matter, each name behind a function.

torch promises nothing about these names. Where one is missing, or is something else than it was, no
function here raises: it gives the answer after which nothing wrong is computed in silence. The
tests of this package ask torch for every name.
"""
