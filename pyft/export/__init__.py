"""ONNX: export, running, and the proof that both behave the same."""
