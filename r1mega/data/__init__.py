"""Everything that training reads: tokenizer, text, problems, token files, loaders and prompts with cursors. Imports no torch."""
