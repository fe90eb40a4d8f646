"""Sinks of metrics: TensorBoard, Weights & Biases, MLflow and trackio, fed from metrics.jsonl."""
