"""All that fastsn uses of torch without torch having promised it.

Each name stands behind a function that says what it is needed for and gives the safe answer where
the name is missing or means something else. ``tests/torch_internals`` asks torch for each of them.
"""
