"""One normalized weight, whatever its form.

``normalizer`` has what all forms share, the one read among it; ``parametrized``, ``hooked`` and
``biggan`` are the forms, ``find`` enumerates the weights of a model.
"""
