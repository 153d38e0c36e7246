"""Data sets to a trained captioner: photos, features, the TensorFlow model, checkpoints and scores.

Importing the package imports no TensorFlow: the modules that need it import it themselves.
"""
