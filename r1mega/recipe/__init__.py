"""The pipeline as a graph of stages: order, keys, kept results, execution, summary."""
