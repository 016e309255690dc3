"""What a model can do without training on the task: benchmarks, cloze items, bits per byte."""
