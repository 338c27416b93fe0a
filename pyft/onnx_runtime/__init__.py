"""Running and judging an exported file with NumPy and onnxruntime alone; torch is never imported."""
