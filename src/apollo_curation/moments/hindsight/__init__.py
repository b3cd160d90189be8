"""Hindsight: what the user's next message says about an answer, by the served model's own likelihoods.

The answer is scored twice: as it was given, and with the next message shown before it. What makes it less
likely spoke against it (arXiv:2603.12273). How a difference becomes a probability, and whether a model can
tell at all, is learned on labelled samples (calibration.py).
"""
