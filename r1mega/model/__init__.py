"""DeepSeek on Megatron-Core: config to layer specs to this rank's part of the model, and the one Hugging Face name table."""
