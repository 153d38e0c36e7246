"""caption-rt: a photo in, a sentence out, with ONNX Runtime and without TensorFlow."""
