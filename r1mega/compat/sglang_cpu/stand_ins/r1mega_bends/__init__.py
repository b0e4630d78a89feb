"""Loaded by SGLang's registry of models in the process that has the model; holds no model: each module bends one thing."""
