"""What fastsn uses of torch without torch having promised it, one module for each matter.

Each name stands behind a function that says what it is needed for. Where one is missing, or is
something else than it was, no function here raises in a forward: it gives the answer after which
nothing wrong is computed in silence. The tests of this package ask torch for every name.
"""
