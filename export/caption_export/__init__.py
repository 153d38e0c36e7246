"""A trained run to a verified bundle: TensorFlow to ONNX, compared stage by stage on real photos before it is written.

Importing the package imports neither TensorFlow nor ONNX: the modules that need them import them themselves.
"""
