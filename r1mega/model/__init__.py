"""DeepSeek on Megatron-Core: config to layer specs to this rank's part of the model, and the one Hugging Face name table."""

from r1mega.compat.megatron_plain import quiet

quiet()  # Megatron warns while it is imported, which the files of this room do
